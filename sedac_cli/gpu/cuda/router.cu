// The learned router: score = w . n + u . silu(V n) + c with n = layer_norm(x) without weights; score > t skips the MLP.
// A block takes ROWS rows: their normed states lie in shared memory, and each warp sums its share of the 1 + UNITS products
// over all of them, so that the weights (float32, from the L2 cache) are read once per ROWS rows.
// Constants: T, ROWS. matrix: [1 + UNITS, width], the first row is w; outer: [UNITS].

#define THREADS 512

extern "C" __global__ void __launch_bounds__(THREADS) router(
    const typename Elem<T>::raw* hidden, i64 outer_stride, i64 inner, int per_outer, int rows, int width,
    const float* matrix, const float* outer, int units, const float* bias, float eps, u32* scratch,
    const float* threshold_at, float threshold, float* score_out, u8* run_out, const u8* may_skip, const u8* real, int* needs,
    const u64* handles, int handle_count, int has_opposite) {
  DYNAMIC_SHARED(dynamic);
  float* normal = (float*)dynamic;                   // [ROWS, padded]
  __shared__ float parts[THREADS / 32], products[ROWS][65];
  constexpr int N = Vec<T>::N;
  const Rows at = {outer_stride, inner, per_outer};
  const int padded = (width + 3) / 4 * 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * ROWS;
  const int count = min(ROWS, rows - first);
  for (int r = 0; r < count; ++r) {
    const typename Elem<T>::raw* p = hidden + at.offset(first + r);
    const bool aligned = ((u64)p & 15) == 0;
    float* mine = normal + r * padded;
    float sum = 0.0f;
    for (int i = threadIdx.x * N; i < padded; i += THREADS * N) {
      float v[N];
      unpack<T>(load_vec<T>(p + i, width - i, aligned && i + N <= width), v);  // past the end: zeros
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum += v[j];
        if (i + j < padded) mine[i + j] = v[j];
      }
    }
    sum = warp_sum(sum);
    __syncthreads();  // the last row's readers of `parts` are done
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    float mean = 0.0f;
    for (int w = 0; w < THREADS / 32; ++w) mean += parts[w];
    mean /= width;
    float square = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) square = fmaf(mine[i] - mean, mine[i] - mean, square);
    square = warp_sum(square);
    __syncthreads();
    if (lane == 0) parts[warp] = square;
    __syncthreads();
    float variance = 0.0f;
    for (int w = 0; w < THREADS / 32; ++w) variance += parts[w];
    const float scale = rsqrtf(variance / width + eps);
    for (int i = threadIdx.x; i < padded; i += THREADS) mine[i] = i < width ? (mine[i] - mean) * scale : 0.0f;
  }
  __syncthreads();
  for (int unit = warp; unit <= units; unit += THREADS / 32) {
    const float* w = matrix + (i64)unit * padded;
    float dot[ROWS] = {};
#pragma unroll 4
    for (int i = lane * 4; i < padded; i += 128) {
      const float4 q = __ldg((const float4*)(w + i));
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float4 v = *(const float4*)(normal + r * padded + i);
        dot[r] = fmaf(q.x, v.x, fmaf(q.y, v.y, fmaf(q.z, v.z, fmaf(q.w, v.w, dot[r]))));
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float total = warp_sum(dot[r]);
      if (lane == 0) products[r][unit] = total;
    }
  }
  __syncthreads();
  bool need = false;
  if (warp == 0) {
    for (int r = 0; r < count; ++r) {
      float score = 0.0f;
      for (int unit = 1 + lane; unit <= units; unit += 32) {
        const float z = products[r][unit];
        score = fmaf(__ldg(outer + unit - 1), z / (1.0f + __expf(-z)), score);
      }
      score = warp_sum(score) + products[r][0] + __ldg(bias);
      const int row = first + r;
      // !(score > t): a NaN runs the MLP, as everything unsure does.
      const bool run = !(score > number(threshold_at, threshold)) || (may_skip && !may_skip[row]);
      if (lane == 0) score_out[row] = score, run_out[row] = run;
      need = need || (run && (!real || real[row]));
    }
  }
  publish_need(need, scratch, gridDim.x, needs, handles, handle_count, has_opposite);
}
