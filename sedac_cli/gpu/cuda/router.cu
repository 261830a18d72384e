// A per-layer router: LayerNorm without weights, Linear(H -> 1), logit > t runs the MLP. The row stays in registers, so the
// variance is taken about the true mean and the hidden state is read once.
// Constants: T, WARPS per row, VECTORS per lane (WARPS * 32 * VECTORS * 16 bytes hold a row), ROWS per block.

#define THREADS (WARPS * ROWS * 32)

// The sum over the warps of one row, for each of its threads. Each use has `shared` words of its own: one barrier is enough.
__device__ __forceinline__ float row_sum(float x, float* shared) {
  x = warp_sum(x);
  if constexpr (WARPS > 1) {
    const int warp = threadIdx.x / 32, first = warp / WARPS * WARPS;
    if (threadIdx.x % 32 == 0) shared[warp] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) x += shared[first + w];
  }
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) router(
    const typename Elem<T>::raw* hidden, i64 outer, i64 inner, int per_outer, int rows, int width,
    const float* weight, const float* bias, float eps, u32* scratch, const float* threshold_at, float threshold,
    float* logit_out, u8* run_out, const u8* may_skip, const u8* real, int* needs,
    const u64* handles, int handle_count, int has_opposite) {
  constexpr int N = Vec<T>::N;
  __shared__ float shared[3][THREADS / 32];
  const Rows at = {outer, inner, per_outer};
  const int row = blockIdx.x * ROWS + threadIdx.x / (WARPS * 32), lane = threadIdx.x % (WARPS * 32);
  const bool mine = row < rows;
  const typename Elem<T>::raw* p = hidden + at.offset(mine ? row : rows - 1);
  const bool aligned = ((u64)p & 15) == 0;
  uint4 q[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int k = (lane + i * WARPS * 32) * N;
    q[i] = load_vec<T>(p + k, width - k, aligned);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    float v[N];
    unpack<T>(q[i], v);  // past the end: zeros
#pragma unroll
    for (int j = 0; j < N; ++j) sum += v[j];
  }
  const float mean = row_sum(sum, shared[0]) / width;
  float square = 0.0f, dot = 0.0f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int k = (lane + i * WARPS * 32) * N;
    float v[N];
    unpack<T>(q[i], v);
    if (k + N <= width) {
#pragma unroll
      for (int j = 0; j < N; j += 4) {
        const float4 w = __ldg((const float4*)(weight + k + j));
        const float c0 = v[j] - mean, c1 = v[j + 1] - mean, c2 = v[j + 2] - mean, c3 = v[j + 3] - mean;
        square = fmaf(c0, c0, fmaf(c1, c1, fmaf(c2, c2, fmaf(c3, c3, square))));
        dot = fmaf(c0, w.x, fmaf(c1, w.y, fmaf(c2, w.z, fmaf(c3, w.w, dot))));
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (k + j < width) {
          const float c = v[j] - mean;
          square = fmaf(c, c, square);
          dot = fmaf(c, __ldg(weight + k + j), dot);
        }
      }
    }
  }
  square = row_sum(square, shared[1]);
  dot = row_sum(dot, shared[2]);
  bool need = false;
  if (mine && lane == 0) {
    const float logit = dot * rsqrtf(square / width + eps) + __ldg(bias);
    // !(logit <= t): a NaN runs the MLP, as everything unsure does.
    const bool run = !(logit <= number(threshold_at, threshold)) || (may_skip && !may_skip[row]);
    logit_out[row] = logit;
    run_out[row] = run;
    need = run && (!real || real[row]);
  }
  publish_need(need, scratch, gridDim.x, needs, handles, handle_count, has_opposite);
}
