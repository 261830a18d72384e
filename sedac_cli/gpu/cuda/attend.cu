// Attention of one new token per row over the cache, which is read once. Rows of `qkv` hold q heads, k heads and v heads of D each,
// as the linear layer gave them: an RMSNorm over each head of q and k (if there are weights) and the rotation are done here, and
// the new k and v go to the cache at *slot. The keys of a (row, key head) are shared out over up to SPLITS blocks, each for all G
// query heads, and within a block over its warps, KEYS at a time: a warp has a ring of its own in shared memory, a maximum and a sum
// of its own for each head, and waits for no other. The tensor cores multiply: 16 rows of heads (those above G are zeros) by KEYS
// keys, and what becomes of it, rounded to T, by the values. Then the shares are joined: in a cluster each block joins a part of
// the row through the others' shared memory; else the block that ends last joins what the others left in memory.
// Constants: T (1, 2), D (head size), G (query heads per key head), WARPS, STAGES (of a warp's ring), SPLITS (up to 32), CLUSTERED (1:
// the SPLITS blocks of a group, up to 16, are a cluster).

#define THREADS (32 * WARPS)
#define BLOCKS (D <= 128 ? 16 / WARPS : 1)  // of a multiprocessor, as far as registers go
#define KEYS 16
#define STRIDE (D * 2 + 16)        // bytes between keys: 16 more, so that the lanes of a matrix load meet no bank twice
#define TILE (2 * KEYS * STRIDE)   // keys, then values
#define STEPS (D / 16)
#define VECTORS (D / 8)
#define EACH ((D + 31) / 32)       // elements of a head per lane of a warp
#define MINE ((G + WARPS) / WARPS)  // heads of a warp, with that of the newest key
#define LOG2E 1.4426950408889634f
#define LOW (-__int_as_float(0x7f800000))

typedef Elem<T>::raw raw;

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

// Over the four lanes that hold one row of a product.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

#if CLUSTERED
#define AS_CLUSTER __cluster_dims__(1, SPLITS, 1)
#else
#define AS_CLUSTER
#endif

extern "C" __global__ void AS_CLUSTER __launch_bounds__(THREADS, BLOCKS) attend(
    const raw* qkv, i64 stride, raw* keys, raw* values, i64 row_stride, i64 head_stride, int k_heads, const i64* slot,
    const i64* first, int window, float scale, float softcap, int rotary, const raw* cos, const raw* sin, const raw* q_norm,
    const raw* k_norm, float eps, float* partial, u32* counter, raw* out, i64 out_stride) {
  DYNAMIC_SHARED(dynamic);  // a ring per warp; in the end the warps' sums
  __shared__ __align__(16) raw query[16][D + 8];
  __shared__ float turned[WARPS][D], tops[WARPS][16], totals[WARPS][16], top[G], total[G], weight[G][SPLITS];
  __shared__ raw fresh[2][D];
  __shared__ bool last;
  const int group = blockIdx.x, chunk = blockIdx.y, row = group / k_heads, head = group % k_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int end = (int)*slot + 1;
  int begin = (int)first[row];
  if (window > 0) begin = max(begin, end - window);
  const int share = ((end - begin + SPLITS - 1) / SPLITS + KEYS - 1) / KEYS * KEYS;
  const int chunks = (end - begin + share - 1) / share;
  if (chunk >= chunks) {
    settle();
    return;
  }
  const int from = begin + chunk * share, count = min(share, end - from);
  const int newest = end - 1 - from;  // of this block's share, if it is under `count`
  const i64 base = row * row_stride + (i64)head * head_stride + (i64)from * D;
  const u32 ring = shared_address(dynamic) + warp * STAGES * TILE;
  // A warp's tile into its ring: all but the newest key were there before the step began, and zeros stand for what is not.
  auto ask = [&](int tile, int into) {
    const int low = tile * KEYS;
    if (low < count) {
      const u32 to = ring + into * TILE;
#pragma unroll
      for (int i = 0; i < KEYS * VECTORS / 32; ++i) {
        const int line = (lane + i * 32) / VECTORS, vector = (lane + i * 32) % VECTORS;
        const bool there = low + line < min(count, newest);
        const i64 at = base + (there ? (i64)(low + line) * D + vector * 8 : 0);
        copy_async16(to + line * STRIDE + vector * 16, keys + at, there ? 16 : 0);
        copy_async16(to + (KEYS + line) * STRIDE + vector * 16, values + at, there ? 16 : 0);
      }
    }
    copy_async_commit();
  };
  // While the launch ahead still runs: the first keys, and the angles of this position.
#pragma unroll
  for (int i = 0; i < STAGES; ++i) ask(warp + i * WARPS, i);
  for (int i = threadIdx.x; i < (16 - G) * D; i += THREADS) query[G + i / D][i % D] = 0;
  float turn_cos[EACH], turn_sin[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = lane + e * 32;
    turn_cos[e] = i < rotary ? widen<T>(cos[row * rotary + i]) : 1.0f;
    turn_sin[e] = i < rotary ? widen<T>(sin[row * rotary + i]) : 0.0f;
  }
  settle();
  release();
  // One warp norms and rotates a head, with `x` to exchange what stands half a rotation apart.
  // The heads of q and, for the newest key, of k, shared out over the warps: all are asked for before the first is worked on.
  const raw* own = qkv + row * stride;
  const bool makes = newest < count;
  raw heads[MINE][EACH], new_value[EACH];
#pragma unroll
  for (int j = 0; j < MINE; ++j) {
    const int i = warp + j * WARPS;
    const raw* at = own + (i64)(i < G ? head * G + i : k_heads * G + head) * D;
#pragma unroll
    for (int e = 0; e < EACH; ++e) heads[j][e] = (i < G || (i == G && makes)) && lane + e * 32 < D ? at[lane + e * 32] : 0;
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e)
    new_value[e] = makes && warp == WARPS - 1 && lane + e * 32 < D ? own[(i64)(k_heads * (G + 1) + head) * D + lane + e * 32] : 0;
  // One warp norms and rotates a head, with `x` to exchange what stands half a rotation apart.
  float* const x = turned[warp];
  auto turn = [&](const raw (&of)[EACH], const raw* by, auto put) {
    float v[EACH], square = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) v[e] = widen<T>(of[e]);
    if (by) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) square = fmaf(v[e], v[e], square);
      const float rate = rsqrtf(warp_sum(square) / D + eps);
#pragma unroll
      for (int e = 0; e < EACH; ++e)
        if (lane + e * 32 < D) v[e] = rounded(rounded(v[e] * rate) * widen<T>(by[lane + e * 32]));
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e)
      if (lane + e * 32 < D) x[lane + e * 32] = v[e];
    __syncwarp();
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int i = lane + e * 32, half = rotary / 2;
      if (i < rotary) v[e] = rounded(v[e] * turn_cos[e]) + rounded((i < half ? -x[i + half] : x[i - half]) * turn_sin[e]);
    }
    __syncwarp();
#pragma unroll
    for (int e = 0; e < EACH; ++e)
      if (lane + e * 32 < D) put(lane + e * 32, narrow<T>(v[e]));
  };
  const i64 new_at = base + (i64)newest * D;
#pragma unroll
  for (int j = 0; j < MINE; ++j) {
    const int i = warp + j * WARPS;
    if (i < G) turn(heads[j], q_norm, [&](int at, raw y) { query[i][at] = y; });
    else if (i == G && makes) turn(heads[j], k_norm, [&](int at, raw y) { keys[new_at + at] = fresh[0][at] = y; });
  }
  if (makes && warp == WARPS - 1) {
#pragma unroll
    for (int e = 0; e < EACH; ++e)
      if (lane + e * 32 < D) values[new_at + lane + e * 32] = fresh[1][lane + e * 32] = new_value[e];
  }
  __syncthreads();
  const u32 queries = shared_address(&query[lane % 16][lane / 16 * 8]);
  float acc[STEPS][2][4] = {}, m[2] = {LOW, LOW}, sum[2] = {};
  int into = 0;
  for (int tile = warp; tile * KEYS < count; tile += WARPS) {
    copy_async_wait<STAGES - 1>();
    const u32 here = ring + into * TILE;
    if (makes && newest / KEYS == tile) {
      u8* to = dynamic + (here - shared_address(dynamic)) + newest % KEYS * STRIDE;
      __syncwarp();  // zeros were copied there, by whichever lanes
      for (int i = lane; i < D; i += 32) ((raw*)to)[i] = fresh[0][i], ((raw*)(to + KEYS * STRIDE))[i] = fresh[1][i];
    }
    __syncwarp();
    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      u32 k[4];
      load_matrix4(k, here + (lane / 16 * 8 + lane % 8) * STRIDE + step * 32 + lane / 8 % 2 * 16);
      u32 q[4];
      load_matrix4(q, queries + step * 32);
      mma_16x8x16<T>(s[0], q, k[0], k[1]);
      mma_16x8x16<T>(s[1], q, k[2], k[3]);
    }
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = LOW;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * h + e];
          x *= scale;
          if (softcap > 0.0f) x = tanhf(x / softcap) * softcap;
          if (tile * KEYS + n * 8 + t * 2 + e >= count) x = LOW;
          most = fmaxf(most, x);
        }
      most = fmaxf(m[h], row_max(most));
      factor[h] = exp2_fast((m[h] - most) * LOG2E);
      m[h] = most, sum[h] *= factor[h];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * h + e];
          x = rounded(exp2_fast((x - most) * LOG2E));
          sum[h] += x;
        }
    }
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[step][n][j] *= factor[j / 2];
    }
    u32 p[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) p[j] = (u32)narrow<T>(s[j / 2][j % 2 * 2]) | (u32)narrow<T>(s[j / 2][j % 2 * 2 + 1]) << 16;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      u32 v[4];
      load_matrix4_turned(v, here + (KEYS + lane % 16) * STRIDE + step * 32 + lane / 16 * 16);
      mma_16x8x16<T>(acc[step][0], p, v[0], v[1]);
      mma_16x8x16<T>(acc[step][1], p, v[2], v[3]);
    }
    __syncwarp();
    ask(tile + STAGES * WARPS, into);
    into = into + 1 == STAGES ? 0 : into + 1;
  }
  copy_async_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] = row_sum(sum[h]);
    if (t == 0) tops[warp][g + h * 8] = m[h], totals[warp][g + h * 8] = sum[h];
  }
  __syncthreads();  // and every warp is done with its ring
  // The warps' sums, [WARPS, G, D] floats, brought to the block's maximum.
  float* shares = (float*)dynamic;
  auto most_of = [&](int i) {
    float most = tops[0][i];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) most = fmaxf(most, tops[w][i]);
    return most;
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = g + h * 8;
    if (i >= G) continue;
    const float factor = exp2_fast((m[h] - most_of(i)) * LOG2E);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        *(float2*)&shares[(warp * G + i) * D + step * 16 + n * 8 + t * 2] =
            make_float2(acc[step][n][2 * h] * factor, acc[step][n][2 * h + 1] * factor);
  }
  if ((int)threadIdx.x < G) {
    const int i = threadIdx.x;
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all = fmaf(exp2_fast((tops[w][i] - most_of(i)) * LOG2E), totals[w][i], all);
    top[i] = most_of(i), total[i] = all;
  }
  __syncthreads();
  raw* to = out + row * out_stride + (i64)head * G * D;
#if CLUSTERED
  for (int i = threadIdx.x; i < G * D; i += THREADS) {
#pragma unroll
    for (int t = 1; t < WARPS; ++t) shares[i] += shares[t * G * D + i];
    if (chunks == 1) to[i] = narrow<T>(shares[i] / total[i / D]);
  }
  if (chunks == 1) return;
  cluster_arrive();  // blocks without keys have ended, and nobody waits for them
  cluster_wait();
  const int part = (G * D + chunks - 1) / chunks;
  for (int i = chunk * part + threadIdx.x; i < min((chunk + 1) * part, G * D); i += THREADS) {
    float its[SPLITS], sums[SPLITS], y[SPLITS], most = LOW, below = 0.0f, above = 0.0f;
#pragma unroll
    for (int c = 0; c < SPLITS; ++c) {
      const int block = min(c, chunks - 1);
      its[c] = load_peer_float(shared_address(&top[i / D]), block);
      sums[c] = load_peer_float(shared_address(&total[i / D]), block);
      y[c] = load_peer_float(shared_address(&shares[i]), block);
    }
#pragma unroll
    for (int c = 0; c < SPLITS; ++c) most = fmaxf(most, its[c]);
#pragma unroll
    for (int c = 0; c < SPLITS; ++c) {
      const float w = c < chunks ? exp2_fast((its[c] - most) * LOG2E) : 0.0f;
      below = fmaf(w, sums[c], below);
      above = fmaf(w, y[c], above);
    }
    to[i] = narrow<T>(above / below);
  }
  cluster_arrive_reader();
  cluster_wait();
#else
  // [group, chunk, G, D + 2]: maximum, sum, weighted values.
  float* mine = partial + ((i64)group * SPLITS + chunk) * G * (D + 2);
  for (int i = threadIdx.x; i < G * D; i += THREADS) {
    float y = 0.0f;
#pragma unroll
    for (int t = 0; t < WARPS; ++t) y += shares[t * G * D + i];
    if (chunks == 1) to[i] = narrow<T>(y / total[i / D]);
    else mine[i / D * (D + 2) + 2 + i % D] = y;
  }
  if (chunks == 1) return;
  if ((int)threadIdx.x < G) mine[threadIdx.x * (D + 2)] = top[threadIdx.x], mine[threadIdx.x * (D + 2) + 1] = total[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter + group, chunks - 1) == (u32)chunks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const float* all = partial + (i64)group * SPLITS * G * (D + 2);
  // The sums of the first EARLY blocks are on their way while their weights are worked out.
  constexpr int TURNS = (G * D + THREADS - 1) / THREADS, EARLY = TURNS > 4 ? 2 : 8;
  float share_of[TURNS][EARLY];
  auto sum_at = [&](int i, int c) { return __ldcg(all + ((i64)c * G + i / D) * (D + 2) + 2 + i % D); };
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn)
#pragma unroll
    for (int c = 0; c < EARLY; ++c) {
      const int i = threadIdx.x + turn * THREADS;
      share_of[turn][c] = i < G * D && c < chunks ? sum_at(i, c) : 0.0f;
    }
  for (int i = warp; i < G; i += WARPS) {
    const float* one = all + ((i64)min(lane, chunks - 1) * G + i) * (D + 2);
    const float its = lane < chunks ? __ldcg(one) : LOW, w = exp2_fast((its - warp_max(its)) * LOG2E);
    if (lane < SPLITS) weight[i][lane] = w;
    const float all_of_it = warp_sum(w * (lane < chunks ? __ldcg(one + 1) : 0.0f));
    if (lane == 0) total[i] = all_of_it;
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int i = threadIdx.x + turn * THREADS;
    if (i >= G * D) break;
    float y = 0.0f;
#pragma unroll
    for (int c = 0; c < EARLY; ++c) y = fmaf(c < SPLITS ? weight[i / D][min(c, SPLITS - 1)] : 0.0f, share_of[turn][c], y);
#pragma unroll 8
    for (int c = EARLY; c < chunks; ++c) y = fmaf(weight[i / D][c], sum_at(i, c), y);
    to[i] = narrow<T>(y / total[i / D]);
  }
#endif
}
