// y = act(x W^T + b) (+ residual) for the rows of a batch, 9 to 64, by Hopper's tensor cores, which read both from shared memory.
//
// W and x pass through a ring there, rows of 128 bytes as the tensor cores want them: their 16-byte pieces swapped within eight rows.
// CLUSTER 1: a block goes from tile to tile, of up to TILE rows of W. More: a tile is a cluster's, and each of its blocks has a part of
// k; then each brings some groups of 16 rows to an end, from the shared memory of all, in the order of k: the same sums every time.
// For matrices of so few rows that tiles would be too few, or x read too often: it comes from L2, TILE / ROWS times less than W.
// GATED: two matrices, y = act(x W0^T) * (x W1^T), each product rounded to T as separate layers would; a group has eight rows of each.
// Rows of up to three matrices stand one after the other (q, k, v), a group within one of them.
// `need`, `standing`, `ready`, `parts`, RACES and OTHER: as in skinny.cu.
// Constants: T (1, 2), ROWS (of x: 16, 32, 64), GATED, ACT (as there), WG (warpgroups, 64 rows of a tile each), CLUSTER (blocks), STAGES
// (of the ring), KC (128 bytes of a row in a step each), RACES.

#define THREADS (128 * WG)
#define TILE (64 * WG)
#define GROUPS (4 * WG)
#define PIECES (8 * KC)                    // of 16 bytes, of a row, in a step
#define LINES (TILE + ROWS)                // rows of 128 bytes
#define SLOT (LINES * 128 * KC)
#define EIGHTS (ROWS / 8)                  // of rows of x
#define EACH ((EIGHTS + CLUSTER - 1) / CLUSTER)  // of them, that a warp brings to an end
static_assert(ROWS * TILE * 4 <= STAGES * SLOT, "the ring is too small for a tile's sums");

// Where a group lies: in which matrix, from which row of it on, and in which column of y the matrix begins.
struct Group {
  const raw *w, *bias;
  int row, n, column;
};

// Small tiles take no more than half the registers: a router's block must find its own beside them.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, WG == 2 ? 2 : 1) batch_hopper(
    const raw* x, i64 x_stride, int m, int k, const raw* w0, const raw* w1, const raw* w2, const raw* b0, const raw* b1,
    const raw* b2, int n0, int n1, int n2, const raw* residual, i64 r_stride, raw* out, i64 out_stride, const int* need,
    int standing, int groups, const int* ready, int parts, const raw* other_w, const raw* other_bias, int other_n, int other_k) {
  const volatile int* flag = need;
  LOOK_AT_STANDING_FLAG
  DYNAMIC_SHARED(dynamic);
  const u32 ring = (shared_address(dynamic) + 1023u) & ~1023u;  // the swizzle counts from 1024 bytes
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = blockIdx.x % CLUSTER;
  auto share_of = [](int all, int i, int of) { return (int)((i64)all * i / of); };
  const int chunks = (k + 64 * KC - 1) / (64 * KC), k_first = share_of(chunks, rank, CLUSTER), steps = share_of(chunks, rank + 1, CLUSTER) - k_first;
  const int run = blockIdx.x / CLUSTER, runs = gridDim.x / CLUSTER, first = share_of(groups, run, runs), last = share_of(groups, run + 1, runs);
  const int tiles = instead ? 0 : (last - first + GROUPS - 1) / GROUPS, units = tiles * steps;
  const int span = tiles ? (last - first + tiles - 1) / tiles : 0;
  auto tile_at = [&](int tile) { return min(first + tile * span, last); };
  auto group_at = [&](int index) {
#if GATED
    return Group{w0, b0, index * 8, n0, 0};
#else
    const int groups0 = (n0 + 15) / 16, groups1 = (n1 + 15) / 16;
    if (index < groups0) return Group{w0, b0, index * 16, n0, 0};
    index -= groups0;
    if (index < groups1) return Group{w1, b1, index * 16, n1, n0};
    return Group{w2, b2, (index - groups1) * 16, n2, n0 + n1};
#endif
  };
  const int piece = threadIdx.x % PIECES, line = threadIdx.x / PIECES;
  auto place = [&](int row) { return (u32)(piece / 8 * (LINES * 128) + row * 128 + ((piece % 8 ^ (row & 7)) << 4)); };

  // What is asked for runs ahead of what is multiplied, from one tile into the next.
  int ask_tile = 0, ask_step = 0, asked = 0;
  const raw* weight[4 * KC];
  auto look_at = [&](int tile) {
    const int end = tile_at(tile + 1);
#pragma unroll
    for (int i = 0; i < 4 * KC; ++i) {
      const int r = line + i * (THREADS / PIECES), index = tile_at(tile) + r / 16;
      const Group group = group_at(min(index, end - 1));
#if GATED
      const raw* w = r & 8 ? w1 : w0;
      const int row = group.row + (r & 7);
#else
      const raw* w = group.w;
      const int row = group.row + r % 16;
#endif
      weight[i] = index < end ? w + (i64)min(row, group.n - 1) * k + piece * 8 : nullptr;
    }
  };
  auto ask_weights = [&](int slot) {
    const int from = (k_first + ask_step) * (64 * KC);
    const bool there = from + piece * 8 < k;  // past the end: zeros, from an address that exists
#pragma unroll
    for (int i = 0; i < 4 * KC; ++i)
      if (weight[i])
        stream16(ring + slot * SLOT + place(line + i * (THREADS / PIECES)), weight[i] + (there ? from : -piece * 8), there ? 16 : 0);
  };
  auto ask_rows = [&](int slot, int step) {
    const int at = (k_first + step) * (64 * KC) + piece * 8;
#pragma unroll
    for (int i = 0; i < (ROWS * PIECES + THREADS - 1) / THREADS; ++i) {
      const int r = line + i * (THREADS / PIECES);
      if (r < m) stream16(ring + slot * SLOT + place(TILE + r), x + (at < k ? r * x_stride + at : 0), at < k ? 16 : 0);
    }
  };
  auto move_on = [&]() {
    ++asked;
    if (++ask_step < steps) return;
    ask_step = 0, ++ask_tile;
    if (ask_tile < tiles) look_at(ask_tile);
  };
#if OTHER && RACES
  bring_nearer(other_w, (i64)other_n * other_k);  // behind the first weights it would come late
#endif
  if (tiles) look_at(0);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i)
    if (i < units) {
      ask_weights(i);
      move_on();
    }
#if RACES
  __shared__ volatile int verdict[2];  // in turns: who is behind reads the one, thread 0 may write the other
  int even = PENDING, odd = PENDING, unit = 0;
#endif
  await_rows(ready, parts, need);
  release();
  instead |= !RACES && need && standing == 0 && closed(*flag);
  if (!OTHER && instead) {
    copy_async_wait<0>();
    return;
  }
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < units) ask_rows(i, i % steps);
    copy_async_commit();
  }
  bool known = !RACES;
  int slot = 0;
  for (int tile = 0; !instead && tile < tiles; ++tile) {
    // What this warp will bring to an end: of one group, some eights of rows of x. What is added is asked for now.
    const int index = tile_at(tile) + warp / CLUSTER * CLUSTER + rank;
    const bool mine = index < tile_at(tile + 1);
    const Group group = group_at(min(index, last - 1));
    const int at = group.row + lane / 4, above = at + (GATED ? 0 : 8);
    auto side_of = [&](int of, int i) { return (of * CLUSTER + warp % CLUSTER) * 8 + lane % 4 * 2 + i % 2; };
    auto wanted = [&](int of, int i) { return mine && (i < 2 ? at : above) < group.n && side_of(of, i) < m; };
    const raw* const second = GATED ? b1 : group.bias;
    raw bias[2] = {};
    if (mine && group.bias && at < group.n) bias[0] = group.bias[at];
    if (mine && second && above < group.n) bias[1] = second[above];
#if !GATED
    raw before[EACH][4] = {};
    if (residual)
#pragma unroll
      for (int of = 0; of < EACH; ++of)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (wanted(of, i)) before[of][i] = residual[side_of(of, i) * r_stride + group.column + (i < 2 ? at : above)];
#endif
    float sum[ROWS / 2] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<STAGES - 2>();
      show_to_tensor_cores();
#if RACES
      if (!known && threadIdx.x == 0) {
        // What is asked for here is looked at two steps later: all would wait for it.
        if (unit & 1) {
          verdict[1] = odd;
          if (odd == PENDING) odd = *flag;
        } else {
          verdict[0] = even;
          if (even == PENDING) even = *flag;
        }
      }
#endif
      __syncthreads();  // the oldest step is there for all, and all are done with the one before
#if RACES
      if (!known) {
        const int now = verdict[unit++ & 1];
        known = now != PENDING;
        if (known && closed(now)) {
          instead = true;
          break;
        }
      }
#endif
      const u64 a = matrix_at(ring + slot * SLOT + warp / 4 * 8192), b = matrix_at(ring + slot * SLOT + TILE * 128);
      warpgroup_begin();
#pragma unroll
      for (int part = 0; part < 4 * KC; ++part) {
        const int on = part / 4 * (LINES * 8) + part % 4 * 2;  // in 16 bytes, of which 16 columns have two
        warpgroup_multiply<T>(sum, a + on, b + on);
      }
      warpgroup_commit();
      if (asked < units) {
        const int into = slot == 0 ? STAGES - 1 : slot - 1;
        ask_weights(into);
        ask_rows(into, ask_step);
        move_on();
      }
      copy_async_commit();
      warpgroup_wait();
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
#if RACES
    if (!known && !instead) {  // a cluster's blocks meet all or none
      settle();
      known = true;
      instead = closed(*flag);
    }
    if (instead) break;
#endif
#if CLUSTER > 1
    // Nothing is in flight any more, and sums take the ring's place: a lane's four numbers of each eight rows, as it holds them.
    auto lies = [&](int warp, int eight) { return ring + ((warp * EIGHTS + eight) * 32 + lane) * 16; };
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) store_shared(lies(warp, i), make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    cluster_arrive();
    cluster_wait();
    float4 part[EACH][CLUSTER];
#pragma unroll
    for (int of = 0; of < EACH; ++of)
#pragma unroll
      for (int block = 0; block < CLUSTER; ++block)
        part[of][block] = load_peer(lies(warp / CLUSTER * CLUSTER + rank, min(of * CLUSTER + warp % CLUSTER, EIGHTS - 1)), block);
#endif
#pragma unroll
    for (int of = 0; of < EACH; ++of) {
#if CLUSTER > 1
      float value[4] = {};
#pragma unroll
      for (int block = 0; block < CLUSTER; ++block) {
        const float4 v = part[of][block];
        value[0] += v.x, value[1] += v.y, value[2] += v.z, value[3] += v.w;
      }
#else
      const float value[4] = {sum[4 * of], sum[4 * of + 1], sum[4 * of + 2], sum[4 * of + 3]};
#endif
#pragma unroll
      for (int i = 0; i < (GATED ? 2 : 4); ++i) {
        if (!wanted(of, i)) continue;
        float y = value[i] + widen<T>(bias[i / 2]);
#if GATED
        y = rounded(activate(rounded(y))) * rounded(value[2 + i] + widen<T>(bias[1]));
#else
        if (ACT) y = activate(rounded(y));
        if (residual) y = widen<T>(before[of][i]) + rounded(y);
#endif
        out[side_of(of, i) * out_stride + group.column + (i < 2 ? at : above)] = narrow<T>(y);
      }
    }
#if CLUSTER > 1
    cluster_arrive_reader();
    cluster_wait();  // nobody leaves while others read what it holds
#endif
  }
#if RACES
  // Who comes after this launch may count on the flag.
  if (!OTHER || !instead) settle();
#endif
  if (instead || tiles == 0) copy_async_wait<0>();
#if OTHER
  // A block may have come to its end before the decision.
  if (instead || (RACES && !known && closed(*flag))) {
    const Other other = {other_w, other_bias, other_n, other_k};
    otherwise(other, GATED ? x : x + k, x_stride, m, residual, r_stride, GATED ? out + n0 : out, out_stride, (float2*)dynamic);
    if (RACES) settle();
  }
#endif
}
