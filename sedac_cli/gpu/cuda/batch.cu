// y = act(x W^T + b) (+ residual) for the rows of a batch, 9 to 64: the weights are read once.
//
// Work comes in units: TILE rows of W times a step of k. A block takes an equal run of consecutive units, whatever tiles they belong
// to, so that all end together; a tile that lies in several runs is put together by the block of them that ends last, part by part
// in the order of k: the same sums every time. W and x pass through a ring in shared memory, rows of 128 bytes with their 16-byte
// pieces swapped so that no two lanes meet in a bank. Nothing of x is kept: it comes from L2, TILE / (8 NT) times less than W.
// GATED: two matrices, y = act(x W0^T) * (x W1^T), each product rounded to T as separate layers would; their rows lie in turns of
// eight, so that a thread has both halves of what it multiplies. Rows of up to three matrices stand one after the other (q, k, v).
// `need`, `standing`, `ready`, `parts`, RACES and OTHER: as in skinny.cu.
// Constants: T (1, 2), NT (8 rows of x each, even), GATED, ACT (as there), MI (16 rows of W a warp each), WR and WK (warps side by side
// in rows of W and in k), STAGES (of the ring), KC (128 bytes of a row in a step each), RACES.

#define THREADS (32 * WR * WK)
#define TILE (16 * MI * WR)
#define OWN (NT / WK)              // of a warp's sums, those that it brings to an end
#define PIECES (8 * KC)            // of 16 bytes, of a row, in a step
#define LINES (TILE + 8 * NT)      // rows of 128 bytes
#define SLOT (LINES * 128 * KC)

// Where a tile lies: of which matrix, from which row of it on, and in which column of y the matrix begins.
struct Tile {
  const raw *w, *bias;
  int row, n, column;
};

extern "C" __global__ void __launch_bounds__(THREADS) batch(
    const raw* x, i64 x_stride, int m, int k, const raw* w0, const raw* w1, const raw* w2, const raw* b0, const raw* b1,
    const raw* b2, int n0, int n1, int n2, const raw* residual, i64 r_stride, raw* out, i64 out_stride, const int* need,
    int standing, int tiles, const int* ready, int parts, float4* partial, u32* arrived, const raw* other_w,
    const raw* other_bias, int other_n, int other_k) {
  const volatile int* flag = need;
  LOOK_AT_STANDING_FLAG
  DYNAMIC_SHARED(dynamic);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WR, share = threadIdx.x / 32 / WR, g = lane / 4, t = lane % 4;
  const int steps = (k + 64 * KC - 1) / (64 * KC), units = tiles * steps;
  auto first_of = [&](int block) { return (int)((i64)block * units / gridDim.x); };
  auto block_of = [&](int unit) { return (int)(((i64)(unit + 1) * gridDim.x - 1) / units); };
  const int begin = first_of(blockIdx.x), end = instead ? begin : first_of(blockIdx.x + 1);
  auto tile_at = [&](int index) {
#if GATED
    return Tile{w0, b0, index * (TILE / 2), n0, 0};
#else
    const int tiles0 = (n0 + TILE - 1) / TILE, tiles1 = (n1 + TILE - 1) / TILE;
    if (index < tiles0) return Tile{w0, b0, index * TILE, n0, 0};
    index -= tiles0;
    if (index < tiles1) return Tile{w1, b1, index * TILE, n1, n0};
    return Tile{w2, b2, (index - tiles1) * TILE, n2, n0 + n1};
#endif
  };
  const u32 ring = shared_address(dynamic);
  const int piece = threadIdx.x % PIECES, line = threadIdx.x / PIECES;
  const u32 place = piece / 8 * (LINES * 128);
  auto swapped = [](int row, int at) { return (u32)(row * 128 + ((at ^ (row & 7)) << 4)); };

  // What is asked for runs ahead of what is multiplied, from one tile into the next.
  int ask_tile = begin / steps, ask_step = begin % steps;
  const raw* weight[TILE * PIECES / THREADS];
  auto look_at = [&](int index) {
    const Tile tile = tile_at(index);
#pragma unroll
    for (int i = 0; i < TILE * PIECES / THREADS; ++i) {
      const int r = line + i * (THREADS / PIECES);
#if GATED
      const raw* w = r & 8 ? w1 : w0;
      const int row = tile.row + (r / 16) * 8 + (r & 7);
#else
      const raw* w = tile.w;
      const int row = tile.row + r;
#endif
      weight[i] = w + (i64)min(row, tile.n - 1) * k + piece * 8;
    }
  };
  look_at(ask_tile);
  auto ask_weights = [&](int slot) {
    const int from = ask_step * (64 * KC);
    const bool there = from + piece * 8 < k;  // past the end: zeros, from an address that exists
#pragma unroll
    for (int i = 0; i < TILE * PIECES / THREADS; ++i)
      stream16(ring + slot * SLOT + place + swapped(line + i * (THREADS / PIECES), piece % 8), weight[i] + (there ? from : -piece * 8), there ? 16 : 0);
  };
  auto ask_rows = [&](int slot, int step) {
    const int at = step * (64 * KC) + piece * 8;
#pragma unroll
    for (int i = 0; i < (8 * NT * PIECES + THREADS - 1) / THREADS; ++i) {
      const int r = line + i * (THREADS / PIECES);
      const bool there = r < m && at < k;
      if (r < 8 * NT)
        stream16(ring + slot * SLOT + place + TILE * 128 + swapped(r, piece % 8), x + (there ? r * x_stride + at : 0), there ? 16 : 0);
    }
  };
  auto move_on = [&]() {
    if (++ask_step < steps) return;
    ask_step = 0, ++ask_tile;
    if (ask_tile < tiles) look_at(ask_tile);
  };
  const int first_step = ask_step;
#if OTHER && RACES
  bring_nearer(other_w, (i64)other_n * other_k);  // behind the first weights it would come late
#endif
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i)
    if (begin + i < end) {
      ask_weights(i);
      move_on();
    }
#if RACES
  __shared__ volatile int verdict[2];  // in turns: who is behind reads the one, thread 0 may write the other
  int seen = PENDING;
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
    if (begin + i < end) ask_rows(i, (first_step + i) % steps);
    copy_async_commit();
  }
  bool known = !RACES;
  int tile = begin / steps, step = first_step, slot = 0;
  float sum[MI][NT][4] = {};
  for (int unit = begin; !(OTHER && instead) && unit < end; ++unit) {
    copy_async_wait<STAGES - 2>();
#if RACES
    if (!known && threadIdx.x == 0) {
      if (seen == PENDING) seen = *flag;
      verdict[unit & 1] = seen;
    }
#endif
    __syncthreads();  // the oldest step is there for all, and all are done with the one before
#if RACES
    if (!known) {
      const int now = verdict[unit & 1];
      known = now != PENDING;
      if (known && closed(now)) {
#if OTHER
        instead = true;
        break;
#endif
        copy_async_wait<0>();
        settle();
        return;
      }
    }
#endif
    if (unit + STAGES - 1 < end) {
      const int into = slot == 0 ? STAGES - 1 : slot - 1;
      ask_weights(into);
      ask_rows(into, ask_step);
      move_on();
    }
    copy_async_commit();
    const u32 here = ring + slot * SLOT;
#pragma unroll
    for (int of = 0; of < 4 * KC / WK; ++of) {
      const int s = of * WK + share;
      const u32 part = here + s / 4 * (LINES * 128);
      u32 a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; ++i)
        load_matrix4(a[i], part + swapped((warp * MI + i) * 16 + lane % 16, s % 4 * 2 + lane / 16));
#pragma unroll
      for (int c = 0; c < NT; c += 2) {
        u32 b[4];
        load_matrix4(b, part + TILE * 128 + swapped(c * 8 + lane / 16 * 8 + lane % 8, s % 4 * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < MI; ++i) {
          mma_16x8x16<T>(sum[i][c], a[i], b[0], b[1]);
          mma_16x8x16<T>(sum[i][c + 1], a[i], b[2], b[3]);
        }
      }
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (++step < steps && unit + 1 < end) continue;

    // The end of a tile, or of this block's share of one.
#if WK == 2
    // The step that was just multiplied leaves its slot free for a while: there the warps of a row exchange halves of their sums.
    static_assert(TILE * NT * 32 <= SLOT, "the ring's slot is too small for the sums");
    {
      float4* const there = (float4*)(dynamic + (slot == 0 ? STAGES - 1 : slot - 1) * SLOT) + threadIdx.x % (32 * WR);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int c = 0; c < OWN; ++c) {
          float give[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) give[j] = share ? sum[i][c][j] : sum[i][c + OWN][j];
          there[((share * MI + i) * OWN + c) * 32 * WR] = make_float4(give[0], give[1], give[2], give[3]);
        }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int c = 0; c < OWN; ++c) {
          const float4 v = there[(((1 - share) * MI + i) * OWN + c) * 32 * WR];
          const float other[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][c][j] = (share ? sum[i][c + OWN][j] : sum[i][c][j]) + other[j];
        }
    }
#endif
    const int low = tile * steps, first = block_of(low), last = block_of(low + steps - 1);
    bool mine = true;
    if (first != last) {
#if RACES
      if (!known) {  // parts are left by all blocks or by none
        settle();
        known = true;
        if (closed(*flag)) {
#if OTHER
          instead = true;
          break;
#endif
          copy_async_wait<0>();
          return;
        }
      }
#endif
      auto part_of = [&](int block) { return partial + (i64)(2 * block + (block == first)) * (MI * OWN * THREADS) + threadIdx.x; };
      float4* own = part_of(blockIdx.x);
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int c = 0; c < OWN; ++c)
          own[(i * OWN + c) * THREADS] = make_float4(sum[i][c][0], sum[i][c][1], sum[i][c][2], sum[i][c][3]);
      mine = arrive_last(arrived + first, last - first + 1);
      if (mine) {
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
          for (int c = 0; c < OWN; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][c][j] = 0.0f;
#pragma unroll 4
        for (int block = first; block <= last; ++block) {
          const float4* from = part_of(block);
#pragma unroll
          for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int c = 0; c < OWN; ++c) {
              const float4 v = __ldcg(from + (i * OWN + c) * THREADS);
              sum[i][c][0] += v.x, sum[i][c][1] += v.y, sum[i][c][2] += v.z, sum[i][c][3] += v.w;
            }
        }
      }
    }
    if (mine) {
      const Tile now = tile_at(tile);
#pragma unroll
      for (int i = 0; i < MI; ++i) {
#if GATED
        const int at = now.row + (warp * MI + i) * 8 + g;
        if (at >= now.n) continue;
        const float gate_bias = b0 ? widen<T>(b0[at]) : 0.0f, up_bias = b1 ? widen<T>(b1[at]) : 0.0f;
#pragma unroll
        for (int c = 0; c < OWN; ++c)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int r = (share * OWN + c) * 8 + t * 2 + e;
            if (r >= m) continue;
            const float y = rounded(activate(rounded(sum[i][c][e] + gate_bias))) * rounded(sum[i][c][2 + e] + up_bias);
            out[r * out_stride + at] = narrow<T>(y);
          }
#else
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = now.row + (warp * MI + i) * 16 + g + h * 8;
          if (at >= now.n) continue;
          const float bias = now.bias ? widen<T>(now.bias[at]) : 0.0f;
#pragma unroll
          for (int c = 0; c < OWN; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int r = (share * OWN + c) * 8 + t * 2 + e;
              if (r >= m) continue;
              float y = sum[i][c][2 * h + e] + bias;
              if (ACT) y = activate(rounded(y));
              if (residual) y = widen<T>(residual[r * r_stride + now.column + at]) + rounded(y);
              out[r * out_stride + now.column + at] = narrow<T>(y);
            }
        }
#endif
      }
    }
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int c = 0; c < NT; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][c][j] = 0.0f;
    if (step == steps) step = 0, ++tile;
  }
  // Who comes after this launch may count on the flag.
  if (RACES && !(OTHER && instead)) settle();
#if OTHER
  // A block may have come to its end before the decision.
  if (instead || (RACES && !known && closed(*flag))) {
    copy_async_wait<0>();
    const Other other = {other_w, other_bias, other_n, other_k};
    otherwise(other, GATED ? x : x + k, x_stride, m, residual, r_stride, GATED ? out + n0 : out, out_stride, (float2*)dynamic);
    if (RACES) settle();
  }
#endif
}
