// The learned router for few rows (router.cu says what it computes): every block takes a slice of one row, so that the weights
// come through as many multiprocessors as there are slices; the block of a row that ends last adds up. The norm is taken
// afterwards: a product with the normed row is (w . x - mean sum(w)) / deviation.
// Constants: T and those of router_parts.cuh.

typedef Elem<T>::raw raw;

extern "C" __global__ void __launch_bounds__(THREADS) router_few(
    const raw* hidden, i64 outer_stride, i64 inner, int per_outer, int width, const float* matrix, int padded,
    const float* outer, int units, const float* bias, float eps, float* partial, u32* counter, const float* threshold_at,
    float threshold, float* score_out, u8* run_out, const u8* may_skip, const u8* real, int* needs, const u64* handles,
    int handle_count, int has_opposite) {
  __shared__ __align__(16) float slice[SLICE];
  __shared__ float shared[THREADS / 32], products[UNITS];
  const int row = blockIdx.y, from = blockIdx.x * SLICE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int length = min(SLICE, width - from);
  SliceWeights weights;
  weights.load(matrix, units, padded, from, warp, lane);
  OuterWeights ends;
  ends.load(outer, bias, units, warp == 0, lane);
  settle();
  release();
  const bool may = !may_skip || may_skip[row], counts = !real || real[row];
  const float limit = number(threshold_at, threshold);
  const Rows rows = {outer_stride, inner, per_outer};
  const raw* p = hidden + rows.offset(row) + from;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < SLICE; i += THREADS) sum += slice[i] = i < length ? widen<T>(p[i]) : 0.0f;
  const float center = block_sum(sum, shared) / length;
  float square = 0.0f;
  for (int i = threadIdx.x; i < length; i += THREADS) square = fmaf(slice[i] - center, slice[i] - center, square);
  square = block_sum(square, shared);
  // Of each slice: its products, its mean, and its squared deviations from that.
  float* mine = partial + ((i64)row * gridDim.x + blockIdx.x) * (UNITS + 2);
  weights.multiply(slice, warp, lane, [&](int u, float v) { mine[u] = v; });
  if (threadIdx.x == 0) mine[UNITS] = center, mine[UNITS + 1] = square;
  if (!arrive_last(counter + 1 + row, gridDim.x)) return;
  const float* all = partial + (i64)row * gridDim.x * (UNITS + 2);
  add_blocks(UNITS, products, [&](int b, int u) { return __ldcg(all + (i64)b * (UNITS + 2) + u); });
  bool need = false;
  if (warp == 0) {
    float mean = 0.0f, deviation = 0.0f;
    for (int b = lane; b < (int)gridDim.x; b += 32)
      mean = fmaf((float)min(SLICE, width - b * SLICE), __ldcg(all + (i64)b * (UNITS + 2) + UNITS), mean);
    mean = warp_sum(mean) / width;
    for (int b = lane; b < (int)gridDim.x; b += 32) {
      const float off = __ldcg(all + (i64)b * (UNITS + 2) + UNITS) - mean;
      deviation += __ldcg(all + (i64)b * (UNITS + 2) + UNITS + 1) + min(SLICE, width - b * SLICE) * off * off;
    }
    const float rate = rsqrtf(warp_sum(deviation) / width + eps);
    const float score = ends.score(products, units, mean, rate, lane);
    const bool run = !(score > limit) || !may;  // a NaN runs the MLP, as everything unsure does
    if (lane == 0) score_out[row] = score, run_out[row] = run;
    need = run && counts;
  }
  publish_need(need, counter, gridDim.y, needs, handles, handle_count, has_opposite);
}
