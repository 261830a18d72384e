// What both linear kernels (skinny.cu, batch.cu) are made of. Constants: T, ACT (0 none, 1 silu, 2 gelu tanh, 3 gelu), OTHER (0, or one more
// than the activation of what is computed where the flag says no).

#define PENDING (-1)

typedef Elem<T>::raw raw;

// 16 bytes on their way into shared memory; the 256-byte hint lets the cache fetch the row ahead.
__device__ __forceinline__ void stream16(u32 to, const raw* p, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(p), "r"(bytes) : "memory");
}

template <int KIND = ACT>
__device__ __forceinline__ float activate(float x) {
  if constexpr (KIND == 1) return x / (1.0f + __expf(-x));
  else if constexpr (KIND == 2) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  else if constexpr (KIND == 3) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  else return x;
}

__device__ __forceinline__ void wait_for(const int* counter, int value) {
  int now;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  while (now < value);
}


#if OTHER
// One matrix, of few rows: y = act(x W^T + b) (+ residual). What a launch does instead if its flag is against it, so that a stand-in
// is no launch of its own. `share` warps of a block take two rows of W together, and 8 rows of x at a time; x may lie in shared
// memory, where `parts` has 16 floats a warp. A call, so that it costs those who do not come here no registers.
struct Other {
  const raw *w, *bias;
  int n, k;
};

__device__ __noinline__ void otherwise(
    Other other, const raw* x, i64 x_stride, int m, const raw* residual, i64 r_stride, raw* out, i64 out_stride, float* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int share = 1;
  while (share < warps && share * 256 < other.k && share * other.n <= warps * (int)gridDim.x) share *= 2;
  const int pairs = warps / share, part = warp % share;
  for (int first = 2 * pairs * blockIdx.x; first < other.n; first += 2 * pairs * gridDim.x) {
    const int at = first + 2 * (warp / share);
    const raw* row[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) row[j] = other.w + (i64)min(at + j, other.n - 1) * other.k;
    for (int top = 0; top < m; top += 8) {
      float sum[16] = {};  // of a row of W 8 each
      for (int i = (part * 32 + lane) * 8; i < other.k; i += share * 256) {
        float w[2][8];
#pragma unroll
        for (int j = 0; j < 2; ++j) unpack<T>(__ldg((const uint4*)(row[j] + i)), w[j]);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          if (top + r >= m) break;
          const uint4* from = (const uint4*)(x + (top + r) * x_stride + i);
          float v[8];
#if RACES && !XS
          unpack<T>(__ldcg(from), v);  // this block's own cache may be old
#else
          unpack<T>(*from, v);
#endif
#pragma unroll
          for (int e = 0; e < 8; ++e)
#pragma unroll
            for (int j = 0; j < 2; ++j) sum[j * 8 + r] = fmaf(w[j][e], v[e], sum[j * 8 + r]);
        }
      }
      // Each exchange halves what a lane still adds up: in the end it has one sum, that of index lane / 2.
#pragma unroll
      for (int half = 8; half; half /= 2)
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const bool upper = lane & (2 * half);
          const float give = upper ? sum[i] : sum[i + half], keep = upper ? sum[i + half] : sum[i];
          sum[i] = keep + __shfl_xor_sync(0xffffffffu, give, 2 * half);
        }
      float total = sum[0] + __shfl_xor_sync(0xffffffffu, sum[0], 1);
      if (share > 1) {
        __syncthreads();  // the last readers are done
        if (lane % 2 == 0) parts[warp * 16 + lane / 2] = total;
        __syncthreads();
        total = 0.0f;
        for (int v = 0; v < share; ++v) total += parts[(warp / share * share + v) * 16 + lane / 2];
      }
      const int j = lane / 16, r = top + lane / 2 % 8;
      if (part || lane % 2 || r >= m || at + j >= other.n) continue;
      float y = total + (other.bias ? widen<T>(other.bias[at + j]) : 0.0f);
      if (OTHER > 1) y = activate<OTHER - 1>(rounded(y));
      if (residual) y = widen<T>(residual[r * r_stride + at + j]) + rounded(y);
      out[r * out_stride + at + j] = narrow<T>(y);
    }
  }
}
#endif
