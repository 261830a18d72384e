// Moving rows by a decision, stable and without the host: rows that stay packed first to last in one buffer, the others in
// another. Every block counts the decisions before its own rows by itself: 8192 bytes from L2 cost less than a second launch.
// Rows are moved as bytes, so one kernel serves every dtype.
// Constants: WIDTH (bytes per access: 16, 8, 4, 2), KEY (0: u8, non-zero leaves; 1: float32, > 0 stays), TWO (sort the leavers too).

#define THREADS 256
#define WARPS (THREADS / 32)

#if WIDTH == 16
typedef uint4 unit;
#elif WIDTH == 8
typedef uint2 unit;
#elif WIDTH == 4
typedef u32 unit;
#else
typedef u16 unit;
#endif

#if KEY == 0
typedef u8 key;
__device__ __forceinline__ bool stays(u8 k) { return k == 0; }
#else
typedef float key;
__device__ __forceinline__ bool stays(float k) { return k > 0.0f; }
#endif

// All loads of a round leave before its first store: the compiler may not reorder them, the pointers could overlap.
__device__ __forceinline__ void copy_row(unit* to, const unit* from, int units, int lane) {
  constexpr int DEEP = 8;
  for (int i = lane; i < units; i += 32 * DEEP) {
    unit q[DEEP];
#pragma unroll
    for (int u = 0; u < DEEP; ++u)
      if (i + u * 32 < units) q[u] = __ldcs(from + i + u * 32);
#pragma unroll
    for (int u = 0; u < DEEP; ++u)
      if (i + u * 32 < units) to[i + u * 32] = q[u];
  }
}

__device__ __forceinline__ void zero_row(unit* to, int units, int lane) {
  const unit zero = {};
  for (int i = lane; i < units; i += 32) to[i] = zero;
}

// How many of keys[0..count) stay; the same in every thread.
__device__ __forceinline__ int count_stays(const key* keys, int count, int* shared) {
  int n = 0;
  constexpr int N = 16 / sizeof(key);
  const int vectors = ((u64)keys & 15) == 0 ? count / N : 0;
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    const uint4 q = __ldg((const uint4*)keys + i);
    const u32 word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#if KEY == 0
#pragma unroll
      for (int b = 0; b < 4; ++b) n += stays((u8)(word[w] >> (8 * b)));
#else
      n += stays(__uint_as_float(word[w]));
#endif
    }
  }
  for (int i = vectors * N + threadIdx.x; i < count; i += THREADS) n += stays(keys[i]);
#pragma unroll
  for (int d = 16; d; d >>= 1) n += __shfl_xor_sync(0xffffffffu, n, d);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = n;
  __syncthreads();
  n = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) n += shared[w];
  return n;
}

// Block b has rows [b * per_block, ...), per_block <= THREADS. slot[row] = place among those that stay, or -1 - place among the others.
extern "C" __global__ void __launch_bounds__(THREADS) split(
    const unit* rows_in, i64 stride, const key* keys, int rows, int units, int per_block,
    unit* stay, i64* stay_index, unit* leave, i64* leave_index, int* slot, int* counts) {
  __shared__ int shared[WARPS], place[THREADS];
  const int first = blockIdx.x * per_block, mine = min(per_block, rows - first);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int before = count_stays(keys, first, shared);
  // The block's own rows: one thread each, ranked by ballots.
  const bool inside = (int)threadIdx.x < mine;
  const bool here = inside && stays(keys[first + threadIdx.x]);
  const u32 votes = __ballot_sync(0xffffffffu, here);
  __syncthreads();
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  int rank = __popc(votes & ((1u << lane) - 1u));
  for (int w = 0; w < warp; ++w) rank += shared[w];
  if (inside) {
    const int row = first + threadIdx.x, to = here ? before + rank : row - before - rank;
    place[threadIdx.x] = here ? to : -1 - to;
    slot[row] = place[threadIdx.x];
    if (here) stay_index[to] = row;
    if (TWO && !here) leave_index[to] = row;
    if (row == rows - 1) {
      counts[0] = before + rank + here;
      counts[1] = rows - counts[0];
    }
  }
  __syncthreads();
  for (int r = warp; r < mine; r += WARPS) {
    const unit* from = rows_in + (i64)(first + r) * stride;
    const int to = place[r];
    if (to >= 0) copy_row(stay + (i64)to * units, from, units, lane);
    else if (TWO) copy_row(leave + (i64)(-1 - to) * units, from, units, lane);
  }
}

// out[row] = stay[slot[row]], or leave[-1 - slot[row]]; without `leave` (TWO = 0) zeros: a skipped MLP adds nothing.
extern "C" __global__ void __launch_bounds__(THREADS) merge(
    const unit* stay, const unit* leave, const int* slot, int rows, int units, unit* out, i64 stride) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  const int from = slot[row];
  unit* to = out + (i64)row * stride;
  if (from >= 0) copy_row(to, stay + (i64)from * units, units, lane);
  else if (TWO) copy_row(to, leave + (i64)(-1 - from) * units, units, lane);
  else zero_row(to, units, lane);
}
