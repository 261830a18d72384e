// y = act(x W^T + b) (+ residual) for few rows of x: the weights are read once, at the speed of memory.
//
// The tensor cores do the sums (W is the 16-row operand, x the 8-column one), whatever the number of rows up to 8 NT. A lane
// loads 16 bytes of two weight rows and of one x row at the same k, and hands them over as they are: the order of k within a
// product does not matter as long as both sides agree, so lanes exchange nothing. Shared memory only holds what is in flight
// (registers would: the compiler then kept 4 loads in flight of 14). The WARPS of a block share k in turns and add up at last. Rows of up to three matrices stand one after the other (q, k, v);
// GATED: two matrices, y = act(x W0^T) * (x W1^T), each product rounded to T as separate layers would.
// `need`: the launch does its work iff (*need != 0) == when. A block that has nothing to do ends at once: that is a gate
// which costs nothing when open, where an IF node around the same work costs 6 us when taken (measured on an H200).
// Constants: T (1, 2), NT (8 rows of x each), GATED, ACT (0 none, 1 silu, 2 gelu tanh, 3 gelu), STAGES (steps of the k axis
// in flight per warp), WARPS.

#define THREADS (32 * WARPS)
#define STEP (32 * WARPS)
#define MT (GATED ? 2 : 1)
#define GROUP_NT (NT < 2 ? NT : 2)

typedef Elem<T>::raw raw;

// 16 bytes on their way into shared memory; the 256-byte hint lets the cache fetch the row ahead.
__device__ __forceinline__ void stream16(u32 to, const raw* p, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(p), "r"(bytes) : "memory");
}

__device__ __forceinline__ float rounded(float x) { return widen<T>(narrow<T>(x)); }

__device__ __forceinline__ float activate(float x) {
#if ACT == 1
  return x / (1.0f + __expf(-x));
#elif ACT == 2
  return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
#elif ACT == 3
  return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#else
  return x;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) skinny(
    const raw* x, i64 x_stride, int m, int k, const raw* w0, const raw* w1, const raw* w2, const raw* b0, const raw* b1,
    const raw* b2, int n0, int n1, int n2, const raw* residual, i64 r_stride, raw* out, i64 out_stride, const int* need,
    int when) {
  if (need && (__ldg(need) != 0) != (when != 0)) return;
  DYNAMIC_SHARED(dynamic);
  __shared__ float partial[WARPS][MT][GROUP_NT][4][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  // Which matrix this block's 16 rows belong to, and where its output columns start.
  const raw *w = w0, *bias = b0;
  int n = n0, tile = blockIdx.x, column = 0;
#if !GATED
  const int tiles0 = (n0 + 15) / 16, tiles1 = (n1 + 15) / 16;
  if (tile >= tiles0) {
    tile -= tiles0, column = n0, w = w1, bias = b1, n = n1;
    if (tile >= tiles1) tile -= tiles1, column = n0 + n1, w = w2, bias = b2, n = n2;
  }
#endif
  const int row = tile * 16 + g;
  const raw* rows[MT][2];
  rows[0][0] = w + (i64)min(row, n - 1) * k;
  rows[0][1] = w + (i64)min(row + 8, n - 1) * k;
#if GATED
  rows[1][0] = w1 + (i64)min(row, n - 1) * k;
  rows[1][1] = w1 + (i64)min(row + 8, n - 1) * k;
#endif
  float sum[MT][NT][4] = {};
  // A lane reads back only what it copied itself: its ring of STAGES steps needs no barrier.
  const u32 ring = shared_address(dynamic) + threadIdx.x * 16;
  const int steps = (k - warp * 32 + STEP - 1) / STEP, mine = warp * 32 + t * 8;
  auto ask = [&](int step) {
    const int at = mine + step * STEP;
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)  // past the end: zeros, from an address that exists
          stream16(ring + ((step % STAGES * MT + i) * 2 + h) * THREADS * 16, rows[i][h] + (at < k ? at : 0), at < k ? 16 : 0);
    }
    copy_async_commit();
  };
#pragma unroll
  for (int step = 0; step < STAGES; ++step) ask(step);
  for (int step = 0; step < steps; ++step) {
    const int at = mine + step * STEP;
    uint4 q[NT];
#pragma unroll
    for (int c = 0; c < NT; ++c) {
      q[c] = make_uint4(0, 0, 0, 0);
      if (c * 8 + g < m && at < k) q[c] = *(const uint4*)(x + (c * 8 + g) * x_stride + at);
    }
    copy_async_wait<STAGES - 1>();
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const uint4* slot = (const uint4*)dynamic + (step % STAGES * MT + i) * 2 * THREADS + threadIdx.x;
      const uint4 a = slot[0], b = slot[THREADS];
      const u32 first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
      for (int c = 0; c < NT; ++c) {
        mma_16x8x16<T>(sum[i][c], first, q[c].x, q[c].y);
        mma_16x8x16<T>(sum[i][c], second, q[c].z, q[c].w);
      }
    }
    ask(step + STAGES);
  }
  // The warps' shares, two groups of 8 rows at a time.
#pragma unroll
  for (int from = 0; from < NT; from += GROUP_NT) {
    if (from) __syncthreads();
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int c = 0; c < GROUP_NT; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) partial[warp][i][c][j][lane] = sum[i][from + c][j];
    __syncthreads();
    for (int e = threadIdx.x; e < GROUP_NT * 128; e += THREADS) {
      const int c = e / 128, j = e / 32 % 4, l = e % 32;
      const int r = (from + c) * 8 + l % 4 * 2 + j % 2, at = tile * 16 + l / 4 + (j / 2) * 8;
      if (r >= m || at >= n) continue;
      float total[MT];
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        total[i] = 0.0f;
#pragma unroll
        for (int v = 0; v < WARPS; ++v) total[i] += partial[v][i][c][j][l];
      }
      float y = total[0];
#if GATED
      if (b0) y += widen<T>(b0[at]), total[1] += widen<T>(b1[at]);
      y = rounded(activate(rounded(y))) * rounded(total[1]);
#else
      if (bias) y += widen<T>(bias[at]);
      if (ACT) y = activate(rounded(y));
      if (residual) y = widen<T>(residual[r * r_stride + column + at]) + rounded(y);
#endif
      out[r * out_stride + column + at] = narrow<T>(y);
    }
  }
}
