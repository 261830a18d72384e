// The learned router for few rows (router.cu says what it computes): every block takes a slice of one row, so that the weights
// come through as many multiprocessors as there are slices; the block of a row that ends last adds up. The norm is taken
// afterwards: a product with the normed row is (w . x - mean sum(w)) / deviation.
// Constants: T, SLICE (of the hidden axis), UNITS (1 + hidden units, rounded up to 8). `outer` holds, behind the hidden units'
// factors, the sum of each row of `matrix`.

#define THREADS 256
#define EACH (UNITS / 8)
#define MORE ((UNITS + 31) / 32)

typedef Elem<T>::raw raw;

extern "C" __global__ void __launch_bounds__(THREADS) router_few(
    const raw* hidden, i64 outer_stride, i64 inner, int per_outer, int width, const float* matrix, int padded,
    const float* outer, int units, const float* bias, float eps, float* partial, u32* counter, const float* threshold_at,
    float threshold, float* score_out, u8* run_out, const u8* may_skip, const u8* real, int* needs, const u64* handles,
    int handle_count, int has_opposite) {
  __shared__ __align__(16) float slice[SLICE];
  __shared__ float shared[THREADS / 32], products[UNITS];
  __shared__ bool last;
  const int row = blockIdx.y, from = blockIdx.x * SLICE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int length = min(SLICE, width - from);
  // The weights depend on nothing: they are on their way before the row is there.
  float4 w[EACH][SLICE / 128];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int unit = warp + e * 8;
#pragma unroll
    for (int i = 0; i < SLICE / 128; ++i) {
      const int at = from + (lane + i * 32) * 4;
      w[e][i] = unit <= units && at < padded ? __ldg((const float4*)(matrix + (i64)unit * padded + at)) : make_float4(0, 0, 0, 0);
    }
  }
  // What the end of the row needs, by the warp that will need it: asked for there, it would hold up the decision.
  float outer_weight[MORE], row_sum[MORE], base = 0.0f, base_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < MORE; ++i) outer_weight[i] = row_sum[i] = 0.0f;
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < MORE; ++i) {
      const int u = 1 + lane + i * 32;
      if (u <= units) outer_weight[i] = __ldg(outer + u - 1), row_sum[i] = __ldg(outer + units + u);
    }
    base = __ldg(bias), base_sum = __ldg(outer + units);
  }
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
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < SLICE / 128; ++i) {
      const float4 v = *(const float4*)&slice[(lane + i * 32) * 4];
      dot = fmaf(w[e][i].x, v.x, fmaf(w[e][i].y, v.y, fmaf(w[e][i].z, v.z, fmaf(w[e][i].w, v.w, dot))));
    }
    dot = warp_sum(dot);
    if (lane == 0) mine[warp + e * 8] = dot;
  }
  if (threadIdx.x == 0) mine[UNITS] = center, mine[UNITS + 1] = square;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter + 1 + row, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const float* all = partial + (i64)row * gridDim.x * (UNITS + 2);
  for (int u = threadIdx.x; u < UNITS; u += THREADS) {
    float y = 0.0f;
#pragma unroll 16
    for (int b = 0; b < (int)gridDim.x; ++b) y += __ldcg(all + (i64)b * (UNITS + 2) + u);
    products[u] = y;
  }
  __syncthreads();
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
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < MORE; ++i) {
      const int u = 1 + lane + i * 32;
      if (u > units) continue;
      const float z = (products[u] - mean * row_sum[i]) * rate;
      score = fmaf(outer_weight[i], z / (1.0f + __expf(-z)), score);
    }
    score = warp_sum(score) + (products[0] - mean * base_sum) * rate + base;
    const bool run = !(score > limit) || !may;  // a NaN runs the MLP, as everything unsure does
    if (lane == 0) score_out[row] = score, run_out[row] = run;
    need = run && counts;
  }
  publish_need(need, counter, gridDim.y, needs, handles, handle_count, has_opposite);
}
