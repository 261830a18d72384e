// RMSNorm and the learned gate's router in one launch: y = norm(x), score = w . n + u . silu(V n) + c with n = layer_norm(y)
// without weights, run = !(score > t). A block norms the whole row but writes, and multiplies with the router, only its
// SLICE of it. Sums of y and y^2 give layer_norm's mean and variance: y comes out of an RMSNorm, so its mean is small against its
// deviation and nothing cancels. The block of a row that ends last adds up what the others have left in memory. In a cluster the
// first is handed it: through memory a decision would wait behind the weights that the next launch asks for meanwhile.
// `ready` counts the blocks whose part of y is there, for a launch that begins before the decision is made.
// RESIDUAL: y = norm(x + residual), the sum rounded to T first and written to `sum_out`, slice by slice as y is. All blocks of a row
// read both rows whole, so neither output may lie in an input's memory.
// Constants: T, RESIDUAL (0, 1), CLUSTERED (1: the SPLITS blocks of a row are a cluster) and those of router_parts.cuh.

#define HELD 2

typedef Elem<T>::raw raw;

#if CLUSTERED
#define AS_CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define AS_CLUSTER
#endif

extern "C" __global__ void AS_CLUSTER __launch_bounds__(THREADS) norm_route(
    const raw* x, i64 x_stride, int width, const raw* weight, float eps, int plus_one, raw* out, i64 out_stride,
    const raw* residual, i64 r_stride, raw* sum_out, i64 sum_stride, const float* matrix, int padded, const float* outer,
    int units, const float* bias, float norm_eps, float* partial, u32* counter, const float* threshold_at, float threshold,
    float* score_out, u8* run_out, const u8* may_skip, const u8* real, int* needs, const u64* handles, int handle_count,
    int has_opposite, int* ready) {
  __shared__ __align__(16) float slice[SLICE];
  __shared__ float shared[32], products[UNITS + 2];
#if CLUSTERED
  __shared__ float parts[SPLITS][UNITS + 2];  // of the first block: what it is given
  __shared__ __align__(8) u64 handed;
  if (blockIdx.x == 0 && threadIdx.x == 0) expect_bytes(shared_address(&handed), sizeof(parts));
  cluster_arrive();
#endif
  const int row = blockIdx.y, from = blockIdx.x * SLICE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  SliceWeights weights;
  weights.load(matrix, units, padded, from, warp, lane);
  float norm_weight[SLICE / THREADS];
#pragma unroll
  for (int i = 0; i < SLICE / THREADS; ++i) {
    const int at = from + threadIdx.x + i * THREADS;
    norm_weight[i] = at < width ? widen<T>(weight[at]) : 0.0f;
  }
  OuterWeights ends;
  ends.load(outer, bias, units, warp, lane);
  settle();
  release();
  // All that comes from memory is asked for at once, and nothing is looked at before: the first HELD vectors of the row, this
  // block's part of it, the masks.
  constexpr int N = Vec<T>::N, STRIDE = NORM_THREADS * N;
  const int begin = threadIdx.x * N;
  const raw* p = x + row * x_stride;
#if RESIDUAL
  const raw* r = residual + row * r_stride;
  const bool aligned = (((u64)p | (u64)r) & 15) == 0;
  struct Both { uint4 x, residual; };
  auto ask = [&](int i) {
    return Both{load_vec<T, true>(p + i, width - i, aligned), load_vec<T, true>(r + i, width - i, aligned)};
  };
  auto value = [](const Both& q) { return add_vec<T>(q.x, q.residual); };
#else
  const bool aligned = ((u64)p & 15) == 0;
  auto ask = [&](int i) { return load_vec<T, true>(p + i, width - i, aligned); };
  auto value = [](const uint4& q) { return q; };
#endif
  decltype(ask(0)) held[HELD];
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if (begin + h * STRIDE < width) held[h] = ask(begin + h * STRIDE);
  raw own[SLICE / THREADS];
  [[maybe_unused]] raw other[SLICE / THREADS];
#pragma unroll
  for (int i = 0; i < SLICE / THREADS; ++i) {
    const int at = min(from + (int)threadIdx.x + i * THREADS, width - 1);
    own[i] = p[at];
#if RESIDUAL
    other[i] = r[at];
#endif
  }
  const int may = may_skip ? may_skip[row] : 1, counts = real ? real[row] : 1;
  const float limit = number(threshold_at, threshold);
  const float scale = norm_scale(width, eps, shared, [&](int i) {
    return value(i == begin ? held[0] : i == begin + STRIDE ? held[1] : ask(i));
  });
  float sum = 0.0f, square = 0.0f;
#pragma unroll
  for (int i = 0; i < SLICE / THREADS; ++i) {
    const int in_slice = threadIdx.x + i * THREADS;
    float y = 0.0f;
    if (from + in_slice < width) {
#if RESIDUAL
      own[i] = narrow<T>(widen<T>(own[i]) + widen<T>(other[i]));
      sum_out[row * sum_stride + from + in_slice] = own[i];
#endif
      const raw stored = narrow<T>(normed(widen<T>(own[i]), scale, norm_weight[i], plus_one));
      out[row * out_stride + from + in_slice] = stored;
      y = widen<T>(stored);
    }
    slice[in_slice] = y;
    sum += y;
    square = fmaf(y, y, square);
  }
  __syncthreads();  // `slice` is there, and this block's part of `out`
  if (ready && threadIdx.x == 0) {
    __threadfence();
    atomicAdd(ready, 1);
  }
#if CLUSTERED
  cluster_wait();
  const u32 there = address_in(shared_address(parts[blockIdx.x]), 0), told = address_in(shared_address(&handed), 0);
  auto take = [&](int u, float v) { hand_over(there + u * 4, v, told); };
#else
  float* all = partial + (i64)row * gridDim.x * (UNITS + 2);
  auto take = [&](int u, float v) { all[(i64)blockIdx.x * (UNITS + 2) + u] = v; };
#endif
  weights.multiply(slice, warp, lane, take);
  sum = block_sum(sum, shared);
  square = block_sum(square, shared);
  if (threadIdx.x == 0) take(UNITS, sum), take(UNITS + 1, square);
#if CLUSTERED
  if (blockIdx.x) return;
  await_bytes(shared_address(&handed));
  add_blocks(UNITS + 2, products, [&](int b, int u) { return parts[b][u]; });
#else
  if (!arrive_last(counter + 1 + row, gridDim.x)) return;
  add_blocks(UNITS + 2, products, [&](int b, int u) { return __ldcg(all + (i64)b * (UNITS + 2) + u); });
#endif
  bool need = false;
  if (warp == 0) {
    const float mean = products[UNITS] / width, rate = rsqrtf(products[UNITS + 1] / width - mean * mean + norm_eps);
    const float score = ends.score(products, units, mean, rate, lane);
    const bool run = !(score > limit) || !may;
    if (lane == 0) score_out[row] = score, run_out[row] = run;
    need = run && counts;
  }
  publish_need(need, counter, gridDim.y, needs, handles, handle_count, has_opposite);
}
