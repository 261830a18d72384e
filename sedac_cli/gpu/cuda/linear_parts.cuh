// What the linear kernels (skinny.cu, batch.cu, batch_hopper.cu) are made of. Constants: T, ACT (0 none, 1 silu, 2 gelu tanh, 3 gelu),
// OTHER (0, or one more than the activation of what is computed where the flag says no), RACES.

#define PENDING (-1)

typedef Elem<T>::raw raw;

__device__ __forceinline__ bool closed(int flag) { return flag == 0; }

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

// Of a launch that may begin before x is there. What this multiprocessor's cache holds may then be older than x: an acquire, of
// whatever it be, empties it.
__device__ __forceinline__ void wait_to_race(const int* ready, int parts, const int* need) {
  if (ready) wait_for(ready, parts);
  else wait_for(need, PENDING);
}

// Once the first weights are on their way.
__device__ __forceinline__ void await_rows(const int* ready, int parts, const int* need) {
#if RACES
  // Blocks of the launch ahead are all resident before this one's may be, so what is waited for here comes.
  if (threadIdx.x == 0) wait_to_race(ready, parts, need);
  __syncthreads();
#else
  settle();
#endif
}

#if OTHER
// Loads of each operand on their way to a lane. Fewer where skinny.cu asks for x too: registers that went to memory cost more.
#if defined(XS) && !XS
#define AT_ONCE 3
#else
#define AT_ONCE 4
#endif

// One matrix: y = act(x W^T + b) (+ residual). What a launch does instead if its flag is against it, so that a stand-in is no launch
// of its own. Latency is all that counts: a piece of work is up to eight rows of W by eight of x, all of which is asked for at once
// by `share` warps of a block; the tensor cores take 32 of k at a time, in any order both sides agree on (skinny.cu). x may lie in
// shared memory; `parts` has 32 float2 a warp. A call, so that it costs those who do not come here no registers.
struct Other {
  const raw *w, *bias;
  int n, k;
};

// Into L2, by all blocks together.
__device__ __forceinline__ void bring_nearer(const raw* w, i64 size) {
  for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 64; i < size; i += (i64)gridDim.x * blockDim.x * 64)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(w + i));
}

__device__ __noinline__ void otherwise(
    Other other, const raw* x, i64 x_stride, int m, const raw* residual, i64 r_stride, raw* out, i64 out_stride, float2* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
  const int steps = (other.k + 31) / 32, eights = (m + 7) / 8;
  int share = 1;
  while (2 * share <= warps && share * AT_ONCE < steps) share *= 2;
  const int groups = warps / share, part = warp % share, together = groups * gridDim.x;  // of 12 warps four may have nothing to do
  // Rows of W a piece: few enough for all blocks to have one, but x is read for each piece again.
  const int rows = min(8, max((other.n * eights + together - 1) / together, min(m, 8) / 2));
  const int pieces = (other.n + rows - 1) / rows * eights;
  __syncthreads();  // what `parts` held has been read
  for (int first = groups * blockIdx.x; first < pieces; first += together) {
    const int piece = warp / share < groups ? first + warp / share : pieces, top = piece % eights * 8, at = piece / eights * rows + g;
    const bool wanted = piece < pieces && g < rows && at < other.n, given = piece < pieces && top + g < m;
    const raw *from = other.w + (i64)at * other.k + t * 8, *beside = x + (top + g) * x_stride + t * 8;
    const uint4 none = make_uint4(0, 0, 0, 0);
    // What the last lines add is asked for here: from memory it would hold up the end.
    float bias = 0.0f, before[2] = {};
    if (part == 0 && wanted) {
      if (other.bias) bias = widen<T>(other.bias[at]);
      if (residual)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (top + t * 2 + e < m) before[e] = widen<T>(residual[(top + t * 2 + e) * r_stride + at]);
    }
    float sum[4] = {};
    for (int step = part; step < steps; step += AT_ONCE * share) {
      uint4 w[AT_ONCE], q[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int in = step + i * share;
        const bool inside = in * 32 + t * 8 < other.k;
        w[i] = wanted && inside ? __ldg((const uint4*)(from + in * 32)) : none;
        q[i] = given && inside ? *(const uint4*)(beside + in * 32) : none;
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const u32 low[4] = {w[i].x, 0, w[i].y, 0}, high[4] = {w[i].z, 0, w[i].w, 0};
        mma_16x8x16<T>(sum, low, q[i].x, q[i].y);
        mma_16x8x16<T>(sum, high, q[i].z, q[i].w);
      }
    }
    // A lane has row g of the piece, and rows 2 t and 2 t + 1 of x.
    float value[2] = {sum[0], sum[1]};
    if (share > 1) {
      parts[threadIdx.x] = make_float2(sum[0], sum[1]);
      __syncthreads();
      value[0] = value[1] = 0.0f;
      if (part == 0)
        for (int v = 0; v < share; ++v) {
          const float2 of = parts[threadIdx.x + v * 32];
          value[0] += of.x, value[1] += of.y;
        }
      __syncthreads();
    }
    if (part || !wanted) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = top + t * 2 + e;
      if (r >= m) continue;
      float y = value[e] + bias;
      if (OTHER > 1) y = activate<OTHER - 1>(rounded(y));
      if (residual) y = before[e] + rounded(y);
      out[r * out_stride + at] = narrow<T>(y);
    }
  }
}
#endif

// The first lines of a kernel, which they may end, so they are no function: a flag that the launch just ahead does not write is looked
// at before anything is asked for. `instead`: the launch does the other's part.
#if OTHER
#define UNLESS_NEEDED \
  if (instead) bring_nearer(other_w, (i64)other_n * other_k);
#else
#define UNLESS_NEEDED                                                                                         \
  if (instead) {                                                                                              \
    release(); /* the next launch need not wait for this one's blocks to find room */                         \
    if (blockIdx.x == 0) settle(); /* for all: who waits for this launch waits for one block that has waited */ \
    return;                                                                                                   \
  }
#endif
#define LOOK_AT_STANDING_FLAG               \
  bool instead = false;                     \
  if (!RACES && need && standing == 1) {    \
    int now = *flag;                        \
    if (now == PENDING) {                   \
      settle();                             \
      now = *flag;                          \
    }                                       \
    instead = closed(now);                  \
    UNLESS_NEEDED                           \
  }
