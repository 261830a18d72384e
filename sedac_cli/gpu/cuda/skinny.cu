// y = act(x W^T + b) (+ residual) for few rows of x: the weights are read once, at the speed of memory.
//
// The tensor cores do the sums (W is the 16-row operand, x the 8-column one), whatever the number of rows up to 8. A lane
// loads 16 bytes of two weight rows and of one x row at the same k, and hands them over as they are: the order of k within a
// product does not matter as long as both sides agree, so lanes exchange nothing. Shared memory only holds what is in flight
// (registers would: the compiler then kept 4 loads in flight of 14). The WARPS of a block share k in turns and add up at last. Rows of up to three matrices stand one after the other (q, k, v);
// GATED: two matrices, y = act(x W0^T) * (x W1^T), each product rounded to T as separate layers would.
// `need`: the launch does its work iff *need != 0. A block that has nothing to do ends at once: that is a gate
// which costs nothing when open, where an IF node around the same work costs 6 us when taken (28 of them in benchmarks/results/gpu_kernels.json).
// `standing` says what is known of the flag. 1: no launch that may still run writes it (if it is PENDING all the same, this one
// waits). 0: the launch ahead writes it; the first weights are asked for before it has ended, since memory is idle while it
// decides. With RACES the work begins as soon as x is there, which `*ready` reaching `parts` says (without `ready`: it was before
// the launch ahead began), and runs beside that launch's decision: until the flag is no longer PENDING one thread of a block looks
// at it after every step and tells the others, who wait for nobody.
// Constants: T (1, 2), TILES (up to 16 rows of W each, an item's), GATED, ACT (0 none, 1 silu, 2 gelu tanh, 3 gelu), STAGES (steps of the k axis
// in flight per warp), WARPS, LOOP (more items than blocks), RACES, and where x comes from: XS 0 memory, asked for X_AHEAD steps
// ahead (no more than any warp has), 1 shared memory, into which it is brought first, 2 the same through an RMSNorm; and OTHER (linear_parts.cuh): a launch that
// its flag is against then does that work. GATED: on the same x, into the columns behind those of y (a block that has not
// heard of the decision yet may still write these); otherwise on the columns of x behind the first k, into the same y.

#define THREADS (32 * WARPS)
#define STEP (32 * WARPS)
#define MT (GATED ? 2 : TILES)
#define AHEAD (!LOOP)  // one element of the output a thread, known before the sums
#define RING (STAGES * MT * 2 * THREADS * 16)
#if OTHER
#define BOUNDS THREADS, 1 + 512 / THREADS  // as many blocks at a time as without: the call must not take their registers
#else
#define BOUNDS THREADS
#endif
#define HELD (512 / THREADS)  // vectors of the norm's weight that a thread has in registers

// The matrices, two side by side (GATED: a tile is of the one or the other) or up to three one after the other, and how their rows are
// shared out: the first `longer` items have one more than `least`.
struct Matrices {
  const raw *w0, *w1, *w2, *b0, *b1, *b2;
  int n0, n1, k, least, longer;
  __device__ __forceinline__ const raw* row(int tile, int at) const {
    if (GATED) return (tile ? w1 : w0) + (i64)at * k;
    return at < n0 ? w0 + (i64)at * k : at < n0 + n1 ? w1 + (i64)(at - n0) * k : w2 + (i64)(at - n0 - n1) * k;
  }
  __device__ __forceinline__ float bias(int tile, int at) const {
    const bool first = GATED ? tile == 0 : at < n0, second = GATED || at < n0 + n1;
    const raw* b = first ? b0 : second ? b1 : b2;
    return b ? widen<T>(b[GATED || first ? at : second ? at - n0 : at - n0 - n1]) : 0.0f;
  }
};

// The rows of one item of work: up to 16 for each of its tiles. A lane loads rows g and g + 8 of a tile.
struct Item {
  const raw* rows[MT][2];
  int start[MT], count[MT];
};

__device__ __forceinline__ Item item_of(int index, int g, const Matrices& of) {
  Item item;
  const int first = index * of.least + min(index, of.longer), all = of.least + (index < of.longer), each = GATED ? all : (all + MT - 1) / MT;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    const int skip = GATED ? 0 : i * each;
    item.start[i] = first + skip, item.count[i] = min(each, all - skip);
#pragma unroll
    for (int h = 0; h < 2; ++h) item.rows[i][h] = g + h * 8 < item.count[i] ? of.row(i, item.start[i] + g + h * 8) : nullptr;
  }
  return item;
}

extern "C" __global__ void __launch_bounds__(BOUNDS) skinny(
    const raw* x, i64 x_stride, int m, int k, const raw* w0, const raw* w1, const raw* w2, const raw* b0, const raw* b1,
    const raw* b2, int n0, int n1, int n2, const raw* residual, i64 r_stride, raw* out, i64 out_stride, const int* need,
    int standing, int items, const int* ready, int parts, const raw* norm, float eps, int plus_one,
    const raw* other_w, const raw* other_bias, int other_n, int other_k) {
  const volatile int* flag = need;
  LOOK_AT_STANDING_FLAG
  DYNAMIC_SHARED(dynamic);
  __shared__ __align__(16) float partial[WARPS][MT][4][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  // A lane reads back only what it copied itself: its ring of STAGES steps needs no barrier. The ring runs on from one item of
  // this block to its next, so the memory bus is busy while an item's sums are put together.
  const u32 ring = shared_address(dynamic) + threadIdx.x * 16;
  const int steps = (k - warp * 32 + STEP - 1) / STEP, mine = warp * 32 + t * 8;
  int asked = 0, ask_step = 0, ask_index = blockIdx.x;
  const int total = GATED ? n0 : n0 + n1 + n2;
  const Matrices of = {w0, w1, w2, b0, b1, b2, n0, n1, k, total / items, total % items};
  Item ahead = item_of(ask_index, g, of);
  auto ask = [&]() {
    if (LOOP ? steps > 0 && ask_index < items : ask_step < steps) {
      const int at = mine + ask_step * STEP;
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // rows and columns that are not there: zeros, from an address that exists
          const bool there = at < k && ahead.rows[i][h];
          stream16(ring + ((asked % STAGES * MT + i) * 2 + h) * THREADS * 16, there ? ahead.rows[i][h] + at : w0, there ? 16 : 0);
        }
      if (++ask_step == steps && LOOP) {
        ask_step = 0, ask_index += gridDim.x;
        if (ask_index < items) ahead = item_of(ask_index, g, of);
      }
    }
    ++asked;
    copy_async_commit();
  };
  if (!instead) {
#pragma unroll
    for (int step = 0; step < STAGES; ++step) ask();
  }
#if XS == 2
  // The norm's weights depend on nothing either.
  uint4 norm_weight[HELD];
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if ((threadIdx.x + h * THREADS) * 8 < k) norm_weight[h] = __ldg((const uint4*)norm + threadIdx.x + h * THREADS);
#endif
#if RACES
  __shared__ volatile int verdict;
  if (threadIdx.x == 0) verdict = PENDING;
#endif
  await_rows(ready, parts, need);
  release();
  int seen = need && (standing == 0 || (RACES && threadIdx.x == 0)) ? *flag : PENDING;
#define STOPPED (!RACES && need && standing == 0 && closed(seen))
#if OTHER && !GATED
  instead |= STOPPED;  // which columns of x are read hangs on it; elsewhere nobody waits for the flag yet
#endif
  // What the last lines of an item add is asked for here: from memory it would hold up the end.
  float last_bias[MT] = {}, last_residual[MT] = {};
#if AHEAD
  if (threadIdx.x < 128 && !(OTHER && instead)) {
    const int row = threadIdx.x % 32 % 4 * 2 + threadIdx.x / 32 % 2, in_tile = threadIdx.x % 32 / 4 + threadIdx.x / 64 * 8;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int at = ahead.start[i] + in_tile;
      if (in_tile >= ahead.count[i] || row >= m) continue;
      last_bias[i] = of.bias(i, at);
      if (!GATED && residual) last_residual[i] = widen<T>(residual[row * r_stride + at]);
    }
  }
#endif
#if XS
  // Rows lie 64 bytes further apart than they are long: two of them then share no bank.
  u8* const here = dynamic + RING;
  const int pitch = (OTHER ? max(k, other_k) : k) * (int)sizeof(raw) + 64;
  const int used = OTHER && instead ? other_k : k, begin = OTHER && !GATED && instead ? k : 0;
  for (int r = 0; r < m; ++r)
    for (int i = threadIdx.x * 8; i < used; i += THREADS * 8) {
      const uint4* from = (const uint4*)(x + r * x_stride + begin + i);
      *(uint4*)(here + r * pitch + i * 2) = RACES ? __ldcg(from) : *from;  // plain loads cost the racing form registers it lacks
    }
  __syncthreads();
#endif
#if XS == 2
  __shared__ float shared[WARPS];
  for (int r = 0; r < m; ++r) {
    uint4* row = (uint4*)(here + r * pitch);
    const float scale = norm_scale(k, eps, shared, [&](int i) { return row[i / 8]; });
    auto apply = [&](int i, uint4 by) {
      float value[8], g[8];
      unpack<T>(row[i], value);
      unpack<T>(by, g);
      u32 word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        word[j] = (u32)narrow<T>(normed(value[2 * j], scale, g[2 * j], plus_one)) |
                  (u32)narrow<T>(normed(value[2 * j + 1], scale, g[2 * j + 1], plus_one)) << 16;
      row[i] = make_uint4(word[0], word[1], word[2], word[3]);
    };
#pragma unroll
    for (int h = 0; h < HELD; ++h)
      if ((threadIdx.x + h * THREADS) * 8 < k) apply(threadIdx.x + h * THREADS, norm_weight[h]);
    for (int i = threadIdx.x + HELD * THREADS; i * 8 < k; i += THREADS) apply(i, __ldg((const uint4*)norm + i));
  }
  __syncthreads();
#endif
  uint4 x_ahead[X_AHEAD + 1];
  auto fetch = [&](int step, uint4& q) {
    const int at = mine + step * STEP;
    q = make_uint4(0, 0, 0, 0);
    if (g >= m || at >= k) return;
#if XS
    q = *(const uint4*)(here + g * pitch + at * 2);
#else
    q = *(const uint4*)(x + g * x_stride + at);
#endif
  };
#pragma unroll
  for (int step = 0; step < X_AHEAD; ++step) fetch(step, x_ahead[step]);
#if !OTHER || GATED
  instead |= STOPPED;
#endif
  if (!OTHER && instead) {
    copy_async_wait<0>();
    return;
  }
  bool known = !RACES;
  int taken = 0;
  for (int index = blockIdx.x; !(OTHER && instead) && index < items; index += LOOP ? gridDim.x : items) {
  float sum[MT][4] = {};
  for (int step = 0; step < steps; ++step, ++taken) {
#if RACES
    if (!known) {
      if (threadIdx.x == 0) {
        if (seen == PENDING) seen = *flag;
        else verdict = seen;
      }
      const int now = __shfl_sync(0xffffffffu, verdict, 0);  // one answer for a warp: its products need all lanes
      known = now != PENDING;
      if (known && closed(now)) break;
    }
#endif
    const int next = step + X_AHEAD;  // behind an item's last step its block's next item begins
    fetch(LOOP && X_AHEAD && next >= steps ? next - steps : next, x_ahead[X_AHEAD]);
    const uint4& q = x_ahead[0];
    copy_async_wait<STAGES - 1>();
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const uint4* slot = (const uint4*)dynamic + (taken % STAGES * MT + i) * 2 * THREADS + threadIdx.x;
      const uint4 a = slot[0], b = slot[THREADS];
      const u32 first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
      mma_16x8x16<T>(sum[i], first, q.x, q.y);
      mma_16x8x16<T>(sum[i], second, q.z, q.w);
    }
#pragma unroll
    for (int ahead_by = 0; ahead_by < X_AHEAD; ++ahead_by) x_ahead[ahead_by] = x_ahead[ahead_by + 1];
    ask();
  }
#if RACES
  // One warp may have seen what another has not: they leave together.
  if (__syncthreads_or(known && closed(verdict))) {
#if OTHER
    instead = true;
    break;
#endif
    copy_async_wait<0>();
    settle();
    return;
  }
#endif
  const Item item = LOOP ? item_of(index, g, of) : ahead;
  // The warps' shares.
  __syncthreads();  // the last item's readers are done
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) partial[warp][i][j][lane] = sum[i][j];
  __syncthreads();
  for (int e = threadIdx.x; e < 128; e += THREADS) {
    const int j = e / 32 % 4, l = e % 32;
    const int r = l % 4 * 2 + j % 2, in_tile = l / 4 + (j / 2) * 8;
    if (r >= m) continue;
    float total[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      total[i] = 0.0f;
#pragma unroll
      for (int v = 0; v < WARPS; ++v) total[i] += partial[v][i][j][l];
      if (AHEAD) total[i] += last_bias[i];
      else if (in_tile < item.count[i]) total[i] += of.bias(i, item.start[i] + in_tile);
    }
#pragma unroll
    for (int i = 0; i < (GATED ? 1 : MT); ++i) {
      const int at = item.start[i] + in_tile;
      if (in_tile >= item.count[i]) continue;
      float y = total[i];
#if GATED
      y = rounded(activate(rounded(y))) * rounded(total[1]);
#else
      if (ACT) y = activate(rounded(y));
      if (residual) y = (AHEAD ? last_residual[i] : widen<T>(residual[r * r_stride + at])) + rounded(y);
#endif
      out[r * out_stride + at] = narrow<T>(y);
    }
  }
  }
  // Who comes after this launch may count on the flag.
  if (RACES && !(OTHER && instead)) settle();
#if OTHER
  // A block may have come to its end before the decision.
  if (instead || (RACES && !known && closed(*flag))) {
#if XS
    const raw* rows = (const raw*)here;
    const i64 apart = pitch / 2;
#else
    const raw* rows = GATED ? x : x + k;
    const i64 apart = x_stride;
#endif
    const Other other = {other_w, other_bias, other_n, other_k};
    otherwise(other, rows, apart, m, residual, r_stride, GATED ? out + n0 : out, out_stride, (float2*)partial);
    copy_async_wait<0>();  // what was on its way is waited for, not asked about
    if (RACES) settle();
  }
#endif
}
