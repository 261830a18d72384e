// LREProbe whole, in one launch: Linear(H -> rank), LayerNorm, Linear(rank -> 1), softplus, threshold, latch, "any token left?".
//
// The projection is cut over blocks, and every block leaves its part in `partial` [tile][split][row][RP]; the block of a tile
// that arrives last adds the parts and finishes the tile's rows; the tile that finishes last publishes the flag.
// Ways to project. RANKS > 0: plain float32 arithmetic, RANKS x ROWS dot products per block; any dtype, any alignment.
// RANKS == 0: tensor cores, ROWS x 64 tiles; the weight is hi + lo in the hidden state's own dtype (PARTS = 2: what is
// lost is 2^-17 of a weight in bf16, 2^-22 in fp16) or hi alone (PARTS = 1: 2^-9 and 2^-12).
// CLUSTER > 0: the same on Hopper: tiles of 64 rows by warpgroup products, which read shared memory themselves, where warps would for
// as long as the tensor cores compute. The CLUSTER blocks of a tile add their parts through each other's shared memory, not through
// memory, and finish 64 / CLUSTER rows each.
// Constants: T, RP (rank rounded up to 64), ROWS per tile, RANKS, PARTS, STAGES, CLUSTER (left out where there is none).

struct Verdict {
  const float* threshold_at;
  float threshold;
  float* risk;
  u8* latched;          // null: nothing is remembered
  const u8* may_skip;   // null: every token may
  const u8* real;       // null: no padding
  int* needs;           // null: nobody asks
  const u64* handles;   // IF nodes to arm
  int handle_count, has_opposite;
};

// Eight lanes share a row; lane q holds columns 4q + 32j .. +3, so eight lanes read 128 bytes at a time.
#define PER_LANE (RP / 8)

__device__ __forceinline__ float eight_sum(float x) {
#pragma unroll
  for (int d = 4; d; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

// Rows a lane finishes at once: reading one at a time, with a latency of L2 each, took a third of the whole kernel.
#if CLUSTER || RANKS > 0 || RP > 64
#define AT_ONCE 1
#else
#define AT_ONCE 4
#endif

#if CLUSTER
#define PER_ROW 288  // bytes of a row of sums in shared memory: 64 floats, and 32 bytes so that eight rows meet all banks
typedef u32 Place;
__device__ __forceinline__ float4 part_of(Place row, int split, i64, int column) { return load_peer(row + column * 4, split); }
#else
#define PER_ROW RP
typedef const float* Place;
__device__ __forceinline__ float4 part_of(Place row, int split, i64 stride, int column) {
  return __ldcg((const float4*)(row + split * stride + column));
}
#endif

// constants: bias[RP], then gamma * head[RP], then {beta . head + head bias, eps}
__device__ __forceinline__ void risks_of(
    const Place (&part)[AT_ONCE], int splits, i64 stride, const float* constants, int rank, float (&risk)[AT_ONCE]) {
  const int q = threadIdx.x % 8;
  float z[AT_ONCE][PER_LANE], scale[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE / 4; ++j) {
    const float4 b = __ldg((const float4*)(constants + 32 * j + 4 * q));
    const float4 g = __ldg((const float4*)(constants + RP + 32 * j + 4 * q));
    scale[4 * j] = g.x, scale[4 * j + 1] = g.y, scale[4 * j + 2] = g.z, scale[4 * j + 3] = g.w;
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
      z[r][4 * j] = b.x, z[r][4 * j + 1] = b.y, z[r][4 * j + 2] = b.z, z[r][4 * j + 3] = b.w;
  }
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
#pragma unroll
      for (int j = 0; j < PER_LANE / 4; ++j) {
        const float4 v = part_of(part[r], s, stride, 32 * j + 4 * q);
        z[r][4 * j] += v.x, z[r][4 * j + 1] += v.y, z[r][4 * j + 2] += v.z, z[r][4 * j + 3] += v.w;
      }
  }
  const float offset = __ldg(constants + 2 * RP), eps = __ldg(constants + 2 * RP + 1);
#pragma unroll
  for (int r = 0; r < AT_ONCE; ++r) {
    float sum = 0.0f, square = 0.0f, dot = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if ((i / 4) * 32 + 4 * q + i % 4 < rank) sum += z[r][i];
    const float mean = eight_sum(sum) / rank;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      if ((i / 4) * 32 + 4 * q + i % 4 < rank) {
        const float c = z[r][i] - mean;
        square = fmaf(c, c, square);
        dot = fmaf(c, scale[i], dot);
      }
    }
    square = eight_sum(square);
    dot = eight_sum(dot);
    const float y = dot * rsqrtf(square / rank + eps) + offset;
    risk[r] = y > 20.0f ? y : log1pf(expf(y));
  }
}

// Called by a whole block, for rows [first, first + count) of `tile`. `sums`: the tile's first part, row by row.
__device__ __forceinline__ bool finish_tile(
    int tile, int first, int count, int rows, Place sums, int splits, const float* constants, int rank, const Verdict& v) {
  const float limit = number(v.threshold_at, v.threshold);
  const int teams = blockDim.x / 8;
  bool need = false;
  // All lanes of a warp stay in the loop: the shuffles inside need them.
  for (int base = 0; base < count; base += teams * AT_ONCE) {
    Place part[AT_ONCE];
    float risk[AT_ONCE];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
      const int local = base + r * teams + threadIdx.x / 8;
      part[r] = sums + (first + min(local, count - 1)) * PER_ROW;
    }
    risks_of(part, splits, (i64)ROWS * RP, constants, rank, risk);
    // Lane r of a row's eight writes row r, so that the rows' masks are read side by side.
    const int mine = threadIdx.x % 8, local = base + mine * teams + threadIdx.x / 8, row = tile * ROWS + first + local;
    float chosen = risk[0];
#pragma unroll
    for (int r = 1; r < AT_ONCE; ++r)
      if (mine == r) chosen = risk[r];
    if (mine < AT_ONCE && local < count && row < rows) {
      v.risk[row] = chosen;
      bool out = chosen < limit && (!v.may_skip || v.may_skip[row]);  // a NaN risk never skips
      if (v.latched) {
        out = out || v.latched[row];
        v.latched[row] = out;
      }
      need = need || (!out && (!v.real || v.real[row]));
    }
  }
  return need;
}

#if RANKS > 0
#define THREADS 256
// A block: RANKS columns x ROWS rows, its 256 threads along the hidden axis.
__device__ __forceinline__ void project(
    const typename Elem<T>::raw* hidden, const Rows& at, int rows, int width, const float* weight, int padded, float* partial) {
  const int tile = blockIdx.x, column = blockIdx.y * RANKS;
  float acc[RANKS * ROWS];
#pragma unroll
  for (int i = 0; i < RANKS * ROWS; ++i) acc[i] = 0.0f;
  constexpr int DEEP = RANKS == 1 ? 2 : 1;  // the 64 sums of the wide form leave no registers for a second round
#pragma unroll DEEP
  for (int k = threadIdx.x * 8; k < padded; k += THREADS * 8) {
    float w[RANKS][8];
#pragma unroll
    for (int n = 0; n < RANKS; ++n) {
      const float4* p = (const float4*)(weight + (i64)(column + n) * padded + k);
      const float4 a = __ldg(p), b = __ldg(p + 1);
      w[n][0] = a.x, w[n][1] = a.y, w[n][2] = a.z, w[n][3] = a.w;
      w[n][4] = b.x, w[n][5] = b.y, w[n][6] = b.z, w[n][7] = b.w;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = min(tile * ROWS + r, rows - 1);  // a row past the end repeats the last: no branch, nothing stored
      const typename Elem<T>::raw* p = hidden + at.offset(row);
      const bool aligned = ((u64)p & 15) == 0;
#pragma unroll
      for (int part = 0; part < 8 / Vec<T>::N; ++part) {
        const int first = k + part * Vec<T>::N;
        float x[Vec<T>::N];
        unpack<T>(load_vec<T, true>(p + first, width - first, aligned), x);
#pragma unroll
        for (int n = 0; n < RANKS; ++n)
#pragma unroll
          for (int j = 0; j < Vec<T>::N; ++j)
            acc[n * ROWS + r] = fmaf(w[n][part * Vec<T>::N + j], x[j], acc[n * ROWS + r]);
      }
    }
  }
  __shared__ float sums[THREADS / 32][RANKS * ROWS];
#pragma unroll
  for (int i = 0; i < RANKS * ROWS; ++i) {
    const float s = warp_sum(acc[i]);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][i] = s;
  }
  __syncthreads();
  if (threadIdx.x < RANKS * ROWS) {
    float s = 0.0f;
    for (int w = 0; w < THREADS / 32; ++w) s += sums[w][threadIdx.x];
    const int n = threadIdx.x / ROWS, r = threadIdx.x % ROWS;
    partial[((i64)tile * ROWS + r) * RP + column + n] = s;
  }
}
#else
#define THREADS (ROWS * 2)
#define BK 64
#define STAGE_BYTES ((ROWS + 64 * PARTS) * BK * 2)
// Rows of 128 bytes in shared memory; 16-byte chunk c of row r lies at c ^ (r % 8), so ldmatrix meets no bank twice.
__device__ __forceinline__ u32 tiles_at() {
  DYNAMIC_SHARED(shared);
#if CLUSTER
  return (shared_address(shared) + 1023u) & ~1023u;  // the swizzle of warpgroup products counts from 1024 bytes
#else
  return shared_address(shared);
#endif
}
__device__ __forceinline__ u32 cell(int row, int chunk) { return (u32)(row * 128 + ((chunk ^ (row & 7)) << 4)); }

// A block: ROWS rows x 64 columns, its share of the hidden axis; each warp 32 x 32 (CLUSTER: all four together 64 x 64).
__device__ __forceinline__ void project(
    const typename Elem<T>::raw* hidden, const Rows& at, int rows, int width, const typename Elem<T>::raw* weight, int padded,
    float* partial) {
  const u32 base = tiles_at();
  const int tile = blockIdx.x, column = blockIdx.y * 64, split = blockIdx.z, splits = gridDim.z;
  const int tid = threadIdx.x, lane = tid % 32;
  const int steps = padded / BK, begin = steps * split / splits, end = steps * (split + 1) / splits;

  // A thread always copies the same 16-byte column of the same rows, one step after the other: only pointers move. A row past
  // the end repeats the last; nothing of it is stored.
  constexpr int LANES = THREADS / 8, X_COPIES = ROWS / LANES, W_COPIES = 64 * PARTS / LANES;
  const int chunk = tid % 8, lead = tid / 8, first = begin * BK + chunk * 8;
  const typename Elem<T>::raw* x_from[X_COPIES];
#pragma unroll
  for (int i = 0; i < X_COPIES; ++i) x_from[i] = hidden + at.offset(min(tile * ROWS + lead + i * LANES, rows - 1)) + first;
  const typename Elem<T>::raw* w_from = weight + (i64)(column + lead) * padded + first;
  const i64 w_stride = (i64)LANES * padded, w_part = (i64)(RP - 64) * padded;
  u32 to = 0, from = 0;  // the stage that is filled next, the one that is read next
  int left = width - first;
  auto fetch = [&]() {
    const u32 x = base + to + cell(lead, chunk), bytes = left > 0 ? (u32)min(left * 2, 16) : 0u;
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
      copy_async16(x + i * LANES * 128, x_from[i], bytes);
      x_from[i] += BK;
    }
    const typename Elem<T>::raw* w = w_from;
#pragma unroll
    for (int i = 0; i < W_COPIES; ++i) {
      copy_async16(x + (ROWS + i * LANES) * 128, w, 16);
      w += w_stride + ((i + 1) * LANES % 64 == 0 ? w_part : 0);
    }
    w_from += BK;
    left -= BK;
    to = to == (STAGES - 1) * STAGE_BYTES ? 0u : to + STAGE_BYTES;
  };

#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (begin + s < end) fetch();
    copy_async_commit();
  }
#if CLUSTER
  float acc[32 * PARTS];
#pragma unroll
  for (int i = 0; i < 32 * PARTS; ++i) acc[i] = 0.0f;
  for (int step = begin; step < end; ++step) {
    copy_async_wait<STAGES - 2>();
    show_to_tensor_cores();
    __syncthreads();
    const u32 x = base + from;
    const u64 a = matrix_at(x), b = matrix_at(x + ROWS * 128);
    warpgroup_begin();
#pragma unroll
    for (int kk = 0; kk < BK / 16; ++kk) warpgroup_multiply<T>(acc, a + kk * 2, b + kk * 2);  // 16 columns are 32 bytes
    warpgroup_commit();
    if (step + STAGES - 1 < end) fetch();  // where the last step's tiles lay: everybody is done with them
    copy_async_commit();  // an empty group keeps the count of pending groups the same in every round
    warpgroup_wait();
    from = from == (STAGES - 1) * STAGE_BYTES ? 0u : from + STAGE_BYTES;
  }
  const int row = tid / 32 * 16 + lane / 4, pair = (lane % 4) * 2;
  __syncthreads();  // the sums take the tiles' place
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 v = make_float2(acc[n * 4 + half * 2], acc[n * 4 + half * 2 + 1]);
#if PARTS == 2
      v.x += acc[32 + n * 4 + half * 2];
      v.y += acc[32 + n * 4 + half * 2 + 1];
#endif
      store_shared(base + (row + half * 8) * PER_ROW + (n * 8 + pair) * 4, v);
    }
#else
  const int warp_m = tid / 64, warp_n = (tid / 32) % 2;
  float acc[2][4][4];
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;
  for (int step = begin; step < end; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < end) fetch();
    copy_async_commit();
    const u32 x = base + from, w = x + ROWS * 128;
    from = from == (STAGES - 1) * STAGE_BYTES ? 0u : from + STAGE_BYTES;
#pragma unroll
    for (int kk = 0; kk < BK / 16; ++kk) {
      u32 a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrix4(a[m], x + cell(warp_m * 32 + m * 16 + lane % 16, kk * 2 + lane / 16));
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          u32 b[4];
          const int n = part * 64 + warp_n * 32 + pair * 16 + lane % 8 + (lane / 16) * 8;
          load_matrix4(b, w + cell(n, kk * 2 + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma_16x8x16<T>(acc[m][pair * 2], a[m], b[0], b[1]);
            mma_16x8x16<T>(acc[m][pair * 2 + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  }
  float* out = partial + ((i64)tile * splits + split) * ROWS * RP + column + warp_n * 32 + (lane % 4) * 2;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m * 32 + m * 16 + lane / 4 + half * 8;
        *(float2*)(out + row * RP + n * 8) = make_float2(acc[m][n][half * 2], acc[m][n][half * 2 + 1]);
      }
#endif
}
#endif

#if RANKS > 0
#define WEIGHT float
#else
#define WEIGHT typename Elem<T>::raw
#endif

#if CLUSTER
#define AS_CLUSTER __cluster_dims__(1, 1, CLUSTER)
#else
#define AS_CLUSTER
#endif

// grid: (tiles, blocks along the rank, splits). scratch: [0] for the flag, [2 + tile] counts a tile's parts.
extern "C" __global__ void AS_CLUSTER __launch_bounds__(THREADS) probe(
    const typename Elem<T>::raw* hidden, i64 outer, i64 inner, int per_outer, int rows, int width,
    const WEIGHT* weight, int padded, const float* constants, int rank, float* partial, u32* scratch,
    const float* threshold_at, float threshold, float* risk, u8* latched, const u8* may_skip, const u8* real, int* needs,
    const u64* handles, int handle_count, int has_opposite) {
  const Rows at = {outer, inner, per_outer};
  const int tile = blockIdx.x;
  settle();
  release();
  project(hidden, at, rows, width, weight, padded, partial);
  const Verdict v = {threshold_at, threshold, risk, latched, may_skip, real, needs, handles, handle_count, has_opposite};
#if CLUSTER
  constexpr int SHARE = ROWS / CLUSTER;
  cluster_arrive();
  cluster_wait();
  const bool need = finish_tile(tile, blockIdx.z * SHARE, SHARE, rows, tiles_at(), CLUSTER, constants, rank, v);
  cluster_arrive_reader();  // what was read has been used
  publish_need(need, scratch, gridDim.x * CLUSTER, needs, handles, handle_count, has_opposite);
  cluster_wait();  // nobody leaves while others read what it holds
#else
  if (!arrive_last(scratch + 2 + tile, gridDim.y * gridDim.z)) return;
  const float* sums = partial + (i64)tile * gridDim.z * ROWS * RP;
  const bool need = finish_tile(tile, 0, ROWS, rows, sums, gridDim.z, constants, rank, v);
  publish_need(need, scratch, gridDim.x, needs, handles, handle_count, has_opposite);
#endif
}
