// What the two launches share in which every block takes a slice of a row for the router, and one of them adds up
// (router_few.cu, norm_route.cu). Constants: SLICE (a multiple of 256), UNITS (1 + hidden units, padded to a multiple of 8).

#define THREADS 256
#define EACH (UNITS / 8)  // products per warp
#define MORE ((UNITS + 31) / 32)

// A block's slice of all units' weights. They depend on nothing: they are on their way before the row is there.
struct SliceWeights {
  float4 w[EACH][SLICE / 128];

  __device__ __forceinline__ void load(const float* matrix, int units, int padded, int from, int warp, int lane) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int unit = warp + e * 8;
#pragma unroll
      for (int i = 0; i < SLICE / 128; ++i) {
        const int at = from + (lane + i * 32) * 4;
        w[e][i] = unit <= units && at < padded ? __ldg((const float4*)(matrix + (i64)unit * padded + at)) : make_float4(0, 0, 0, 0);
      }
    }
  }

  // `take(unit, product)`, by one lane each.
  template <class Take>
  __device__ __forceinline__ void multiply(const float* slice, int warp, int lane, Take take) const {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < SLICE / 128; ++i) {
        const float4 v = *(const float4*)&slice[(lane + i * 32) * 4];
        dot = fmaf(w[e][i].x, v.x, fmaf(w[e][i].y, v.y, fmaf(w[e][i].z, v.z, fmaf(w[e][i].w, v.w, dot))));
      }
      dot = warp_sum(dot);
      if (lane == 0) take(warp + e * 8, dot);
    }
  }
};

// What the end of a row needs, by the warps that will need it: asked for there, it would hold up the decision. `outer` holds the
// outer weights and, behind them, the sum of each row of the matrix.
struct OuterWeights {
  float weight[MORE], row_sum[MORE], base, base_sum;

  __device__ __forceinline__ void load(const float* outer, const float* bias, int units, bool mine, int lane) {
    base = base_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MORE; ++i) weight[i] = row_sum[i] = 0.0f;
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < MORE; ++i) {
      const int u = 1 + lane + i * 32;
      if (u <= units) weight[i] = __ldg(outer + u - 1), row_sum[i] = __ldg(outer + units + u);
    }
    base = __ldg(bias), base_sum = __ldg(outer + units);
  }

  // The score, by one warp, from the products with a row that has not been normed: w . (y - mean) * rate.
  __device__ __forceinline__ float score(const float* products, int units, float mean, float rate, int lane) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MORE; ++i) {
      const int u = 1 + lane + i * 32;
      if (u > units) continue;
      const float z = (products[u] - mean * row_sum[i]) * rate;
      sum = fmaf(weight[i], z / (1.0f + __expf(-z)), sum);
    }
    return warp_sum(sum) + (products[0] - mean * base_sum) * rate + base;
  }
};

// The sums of `count` numbers that each block of a row has left: `part(b, u)`.
template <class Part>
__device__ __forceinline__ void add_blocks(int count, float* products, Part part) {
  for (int u = threadIdx.x; u < count; u += THREADS) {
    float y = 0.0f;
#pragma unroll 16
    for (int b = 0; b < (int)gridDim.x; ++b) y += part(b, u);
    products[u] = y;
  }
  __syncthreads();
}
