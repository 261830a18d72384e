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
// One matrix: y = act(x W^T + b) (+ residual). What a launch does instead if its flag is against it, so that a stand-in is no launch
// of its own. Latency is all that counts: eight rows of W at most are a piece of work, `share` warps of a block divide its k, and
// the tensor cores take 32 of k at a time, in any order both sides agree on (skinny.cu). NX times 8 rows of x at once, which may lie
// in shared memory; `parts` has 32 NX float2 a warp. A call, so that it costs those who do not come here no registers.
struct Other {
  const raw *w, *bias;
  int n, k;
};

// Into L2, by all blocks together.
__device__ __forceinline__ void bring_nearer(const raw* w, i64 size) {
  for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 64; i < size; i += (i64)gridDim.x * blockDim.x * 64)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(w + i));
}

template <int NX>
__device__ __noinline__ void otherwise(
    Other other, const raw* x, i64 x_stride, int m, const raw* residual, i64 r_stride, raw* out, i64 out_stride, float2* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
  const int steps = (other.k + 31) / 32;
  int share = 1;
  while (share < warps && share < steps) share *= 2;
  const int groups = warps / share, part = warp % share, pieces = groups * gridDim.x;
  const int rows = min(8, (other.n + pieces - 1) / pieces);
  __syncthreads();  // what `parts` held has been read
  for (int first = rows * groups * blockIdx.x; first < other.n; first += rows * pieces) {
    const int at = first + rows * (warp / share);
    const bool there = g < rows && at + g < other.n;
    const raw* row = other.w + (i64)(there ? at + g : 0) * other.k + t * 8;
    float sum[NX][4] = {};
#pragma unroll(8 / NX)
    for (int step = part; step < steps; step += share) {
      const bool inside = step * 32 + t * 8 < other.k;
      const uint4 none = make_uint4(0, 0, 0, 0);
      const uint4 w = there && inside ? __ldg((const uint4*)(row + step * 32)) : none;
      uint4 q[NX];
#pragma unroll
      for (int c = 0; c < NX; ++c) {
        const uint4* from = (const uint4*)(x + (c * 8 + g) * x_stride + step * 32 + t * 8);
#if RACES && !XS
        q[c] = c * 8 + g < m && inside ? __ldcg(from) : none;  // this block's own cache may be old
#else
        q[c] = c * 8 + g < m && inside ? *from : none;
#endif
      }
      const u32 low[4] = {w.x, 0, w.y, 0}, high[4] = {w.z, 0, w.w, 0};
#pragma unroll
      for (int c = 0; c < NX; ++c) {
        mma_16x8x16<T>(sum[c], low, q[c].x, q[c].y);
        mma_16x8x16<T>(sum[c], high, q[c].z, q[c].w);
      }
    }
    // A lane has row g of the piece, rows 2 t and 2 t + 1 of each eight of x.
#pragma unroll
    for (int c = 0; c < NX; ++c) parts[(warp * NX + c) * 32 + lane] = make_float2(sum[c][0], sum[c][1]);
    __syncthreads();
    for (int c = part; there && c < NX; c += share) {
      float value[2] = {};
      for (int v = 0; v < share; ++v) {
        const float2 of = parts[((warp / share * share + v) * NX + c) * 32 + lane];
        value[0] += of.x, value[1] += of.y;
      }
      const float bias = other.bias ? widen<T>(other.bias[at + g]) : 0.0f;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = c * 8 + t * 2 + e;
        if (r >= m) continue;
        float y = value[e] + bias;
        if (OTHER > 1) y = activate<OTHER - 1>(rounded(y));
        if (residual) y = widen<T>(residual[r * r_stride + at + g]) + rounded(y);
        out[r * out_stride + at + g] = narrow<T>(y);
      }
    }
    __syncthreads();
  }
}
#endif
