// RMSNorm and the learned gate's router in one launch: y = norm(x), score = w . n + u . silu(V n) + c with n = layer_norm(y)
// without weights, run = !(score > t). A block norms the whole row but writes, and multiplies with the router, only its
// SLICE of it. Sums of y and y^2 give layer_norm's mean and variance: y comes out of an RMSNorm, so its mean is small against its
// deviation and nothing cancels. The block of a row that ends last adds up what the others have left in memory. In a cluster the
// first is handed it: through memory a decision would wait behind the weights that the next launch asks for meanwhile.
// `ready` counts the blocks whose part of y is there, for a launch that begins before the decision is made.
// RESIDUAL: y = norm(x + residual), the sum rounded to T first and written to `sum_out`, slice by slice as y is. All blocks of a row
// read both rows whole, so neither output may lie in an input's memory.
// ROWS: of x, that a block has. More rows a block, fewer blocks, and the router's weights are read less often.
// Constants: T, RESIDUAL (0, 1), ROWS, CLUSTERED (1: the SPLITS blocks of a row are a cluster) and those of router_parts.cuh.

#define HELD (ROWS > 2 ? 1 : 2)
#define NUMBERS (UNITS + 2)  // products, and the sums of y and y^2

typedef Elem<T>::raw raw;

#if CLUSTERED
#define AS_CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define AS_CLUSTER
#endif

extern "C" __global__ void AS_CLUSTER __launch_bounds__(THREADS) norm_route(
    const raw* x, i64 x_stride, int rows, int width, const raw* weight, float eps, int plus_one, raw* out, i64 out_stride,
    const raw* residual, i64 r_stride, raw* sum_out, i64 sum_stride, const float* matrix, int padded, const float* outer,
    int units, const float* bias, float norm_eps, float* partial, u32* counter, const float* threshold_at, float threshold,
    float* score_out, u8* run_out, const u8* may_skip, const u8* real, int* needs, const u64* handles, int handle_count,
    int has_opposite, int* ready) {
  __shared__ __align__(16) float slice[ROWS][SLICE];
  __shared__ float shared[2 * ROWS * THREADS / 32], products[ROWS * NUMBERS];
#if CLUSTERED
  __shared__ float parts[SPLITS][ROWS * NUMBERS];  // of the first block: what it is given
  __shared__ __align__(8) u64 handed;
  if (blockIdx.x == 0 && threadIdx.x == 0) expect_bytes(shared_address(&handed), sizeof(parts));
  cluster_arrive();
#endif
  const int top = blockIdx.y * ROWS, from = blockIdx.x * SLICE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto row_of = [&](int r) { return ROWS == 1 ? top : min(top + r, rows - 1); };  // past the end, the last one again
  SliceWeights weights;
  weights.load(matrix, units, padded, from, warp, lane);
  float norm_weight[SLICE / THREADS];
#pragma unroll
  for (int i = 0; i < SLICE / THREADS; ++i) {
    const int at = from + threadIdx.x + i * THREADS;
    norm_weight[i] = at < width ? widen<T>(weight[at]) : 0.0f;
  }
  OuterWeights ends;
  ends.load(outer, bias, units, warp < ROWS, lane);
  settle();
  release();
  // All that comes from memory is asked for at once, and nothing is looked at before: the first HELD vectors of each row, this
  // block's part of it, the masks.
  constexpr int N = Vec<T>::N, STRIDE = NORM_THREADS * N;
  const int begin = threadIdx.x * N;
#if RESIDUAL
  const bool aligned = ((((u64)x | (u64)residual) & 15) | ((x_stride | r_stride) & (N - 1))) == 0;
  struct Both { uint4 x, residual; };
  auto ask = [&](int r, int i) {
    return Both{load_vec<T, true>(x + row_of(r) * x_stride + i, width - i, aligned),
                load_vec<T, true>(residual + row_of(r) * r_stride + i, width - i, aligned)};
  };
  auto value = [](const Both& q) { return add_vec<T>(q.x, q.residual); };
#else
  const bool aligned = (((u64)x & 15) | (x_stride & (N - 1))) == 0;
  auto ask = [&](int r, int i) { return load_vec<T, true>(x + row_of(r) * x_stride + i, width - i, aligned); };
  auto value = [](const uint4& q) { return q; };
#endif
  decltype(ask(0, 0)) held[ROWS][HELD];
  raw own[ROWS][SLICE / THREADS];
  [[maybe_unused]] raw other[ROWS][SLICE / THREADS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int h = 0; h < HELD; ++h)
      if (begin + h * STRIDE < width) held[r][h] = ask(r, begin + h * STRIDE);
#pragma unroll
    for (int i = 0; i < SLICE / THREADS; ++i) {
      const int at = min(from + (int)threadIdx.x + i * THREADS, width - 1);
      own[r][i] = x[row_of(r) * x_stride + at];
#if RESIDUAL
      other[r][i] = residual[row_of(r) * r_stride + at];
#endif
    }
  }
  const int may = may_skip ? may_skip[row_of(warp)] : 1, counts = real ? real[row_of(warp)] : 1;
  const float limit = number(threshold_at, threshold);
  float scale[ROWS];
  norm_scales(scale, width, eps, shared, [&](int r, int i) {
    return value(i == begin ? held[r][0] : HELD > 1 && i == begin + STRIDE ? held[r][HELD - 1] : ask(r, i));
  });
  float sums[2 * ROWS] = {};  // of y and of y^2, row by row
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int i = 0; i < SLICE / THREADS; ++i) {
      const int in_slice = threadIdx.x + i * THREADS, at = from + in_slice;
      float y = 0.0f;
      if (at < width) {
#if RESIDUAL
        own[r][i] = narrow<T>(widen<T>(own[r][i]) + widen<T>(other[r][i]));
        sum_out[row_of(r) * sum_stride + at] = own[r][i];
#endif
        const raw stored = narrow<T>(normed(widen<T>(own[r][i]), scale[r], norm_weight[i], plus_one));
        out[row_of(r) * out_stride + at] = stored;
        y = widen<T>(stored);
      }
      slice[r][in_slice] = y;
      sums[2 * r] += y;
      sums[2 * r + 1] = fmaf(y, y, sums[2 * r + 1]);
    }
  __syncthreads();  // `slice` is there, and this block's part of `out`
  if (ready && threadIdx.x == 0) {
    __threadfence();
    atomicAdd(ready, 1);
  }
#if CLUSTERED
  cluster_wait();
  const u32 there = address_in(shared_address(parts[blockIdx.x]), 0), told = address_in(shared_address(&handed), 0);
  auto take = [&](int i, float v) { hand_over(there + i * 4, v, told); };
#else
  float* all = partial + (i64)blockIdx.y * gridDim.x * (ROWS * NUMBERS);
  auto take = [&](int i, float v) { all[(i64)blockIdx.x * (ROWS * NUMBERS) + i] = v; };
#endif
#pragma unroll
  for (int r = 0; r < ROWS; ++r) weights.multiply(slice[r], warp, lane, [&](int u, float v) { take(r * NUMBERS + u, v); });
  block_sums(sums, shared);
  if (threadIdx.x == 0)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) take(r * NUMBERS + UNITS, sums[2 * r]), take(r * NUMBERS + UNITS + 1, sums[2 * r + 1]);
#if CLUSTERED
  if (blockIdx.x) return;
  await_bytes(shared_address(&handed));
  add_blocks(ROWS * NUMBERS, products, [&](int b, int i) { return parts[b][i]; });
#else
  if (!arrive_last(counter + 1 + blockIdx.y, gridDim.x)) return;
  add_blocks(ROWS * NUMBERS, products, [&](int b, int i) { return __ldcg(all + (i64)b * (ROWS * NUMBERS) + i); });
#endif
  bool need = false;
  if (warp < ROWS && top + warp < rows) {
    const float* of = products + warp * NUMBERS;
    const float mean = of[UNITS] / width, rate = rsqrtf(of[UNITS + 1] / width - mean * mean + norm_eps);
    const float score = ends.score(of, units, mean, rate, lane);
    const bool run = !(score > limit) || !may;
    if (lane == 0) score_out[top + warp] = score, run_out[top + warp] = run;
    need = run && counts;
  }
  publish_need(need, counter, gridDim.y, needs, handles, handle_count, has_opposite);
}
