// What a decode step does between its matrices: RMSNorm, and attention with rotary positions over the cache.
// Constants: T, ENTRY (1 norm, 2 attend); the norm: RESIDUAL (1: x + residual is normed, and written beside it); `attend`: D (head size), G (query heads per key head), KEYS, SPLITS (both up to 32),
// CLUSTERED (1: the SPLITS blocks of a group, up to 16, are a cluster).

typedef Elem<T>::raw raw;

#if ENTRY == 1
// One block of NORM_THREADS per row. The weight depends on nothing: it is on its way while the launch ahead still runs. HELD
// vectors of both stay in registers.
#define HELD 2
extern "C" __global__ void rms_norm(
    const raw* x, i64 x_stride, int width, const raw* weight, float eps, int plus_one, raw* out, i64 out_stride,
    const raw* residual, i64 r_stride, raw* sum_out, i64 sum_stride) {
  __shared__ float shared[32];
  const raw* p = x + blockIdx.x * x_stride;
  raw* o = out + blockIdx.x * out_stride;
  constexpr int N = Vec<T>::N, STRIDE = NORM_THREADS * N;
  const int begin = threadIdx.x * N;
#if RESIDUAL
  const raw* r = residual + blockIdx.x * r_stride;
  raw* s = sum_out + blockIdx.x * sum_stride;
  const bool aligned = (((u64)p | (u64)o | (u64)weight | (u64)r | (u64)s) & 15) == 0;
#else
  const bool aligned = (((u64)p | (u64)o | (u64)weight) & 15) == 0;
#endif
  auto weight_at = [&](int i) { return load_vec<T>(weight + i, width - i, aligned); };
  uint4 w[HELD], v[HELD];
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if (begin + h * STRIDE < width) w[h] = weight_at(begin + h * STRIDE);
  settle();
  release();
  auto row_at = [&](int i) {
    const uint4 q = load_vec<T, true>(p + i, width - i, aligned);
#if RESIDUAL
    return add_vec<T>(q, load_vec<T, true>(r + i, width - i, aligned));
#else
    return q;
#endif
  };
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if (begin + h * STRIDE < width) v[h] = row_at(begin + h * STRIDE);
  const float scale = norm_scale(width, eps, shared, [&](int i) {
    return i == begin ? v[0] : i == begin + STRIDE ? v[1] : row_at(i);
  });
  auto write = [&](int i, uint4 value, uint4 by) {
    float x[N], g[N];
    unpack<T>(value, x);
    unpack<T>(by, g);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = normed(x[j], scale, g[j], plus_one);
    store_vec<T>(o + i, pack<T>(x), width - i, aligned);
#if RESIDUAL
    store_vec<T>(s + i, value, width - i, aligned);
#endif
  };
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if (begin + h * STRIDE < width) write(begin + h * STRIDE, v[h], w[h]);
  for (int i = begin + HELD * STRIDE; i < width; i += STRIDE) write(i, row_at(i), weight_at(i));
}
#endif

#if ENTRY == 2
// Attention of one new token per row over the cache, which is read once. Rows of `qkv` hold q heads, k heads and v heads of D each,
// as the linear layer gave them: an RMSNorm over each head of q and k (if there are weights) and the rotation are done here, and
// the new k and v go to the cache at *slot. The keys of a (row, key head) are shared out over up
// to SPLITS blocks, each for all G query heads; a block goes through its share KEYS at a time, one tile ahead in shared memory.
// Lane k of a warp scores key k for the warp's own heads, so maxima and sums stay within the warp. Then the shares are joined: in a
// cluster each block joins a part of the row through the others' shared memory; else the block that ends last joins what the
// others left in memory.
#define THREADS 256
#define WARPS (THREADS / 32)
#define SIZE (int)sizeof(raw)
#define STRIDE (D * SIZE + 16)     // bytes between keys: 16 more, so that lanes with a key each meet no bank twice
#define MINE ((G + WARPS - 1) / WARPS)
#define LANES (D / 2)              // threads that hold one value row, two elements each
#define TEAMS (THREADS / LANES)    // runs of keys whose values are summed at the same time
#define EACH ((D + 31) / 32)        // elements of a head per lane of a warp
#define RUN ((KEYS / TEAMS + 3) / 4 * 4)
#define LOG2E 1.4426950408889634f
#define LOW (-__int_as_float(0x7f800000))

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

__device__ __forceinline__ void two(const u8* at, float (&v)[2]) {
  if constexpr (T == 0) {
    const float2 q = *(const float2*)at;
    v[0] = q.x, v[1] = q.y;
  } else {
    const u32 word = *(const u32*)at;
    v[0] = widen<T>((raw)(word & 0xffffu)), v[1] = widen<T>((raw)(word >> 16));
  }
}

#if CLUSTERED
#define AS_CLUSTER __cluster_dims__(1, SPLITS, 1)
#else
#define AS_CLUSTER
#endif

extern "C" __global__ void AS_CLUSTER __launch_bounds__(THREADS) attend(
    const raw* qkv, i64 stride, raw* keys, raw* values, i64 row_stride, i64 head_stride, int k_heads, const i64* slot,
    const i64* first, int window, float scale, float softcap, int rotary, const raw* cos, const raw* sin, const raw* q_norm,
    const raw* k_norm, float eps, float* partial, u32* counter, raw* out, i64 out_stride) {
  DYNAMIC_SHARED(dynamic);  // two tiles, each of keys and values: KEYS rows of STRIDE bytes
  __shared__ __align__(16) float query[G][D];
  __shared__ __align__(16) float p[G][32];
  __shared__ float fade[G], top[G], total[G], weight[G][SPLITS], turned[D];
  __shared__ raw fresh[2][D];
  __shared__ bool last;
  const int group = blockIdx.x, chunk = blockIdx.y, row = group / k_heads, head = group % k_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int end = (int)*slot + 1;
  int begin = (int)first[row];
  if (window > 0) begin = max(begin, end - window);
  const int share = ((end - begin + SPLITS - 1) / SPLITS + KEYS - 1) / KEYS * KEYS;
  const int chunks = (end - begin + share - 1) / share;
  if (chunk >= chunks) {
    settle();
    return;
  }
  const int from = begin + chunk * share, count = min(share, end - from), tiles = (count + KEYS - 1) / KEYS;
  const int newest = end - 1 - from;  // of this block's share, if it is under `count`; one warp makes it
  const bool makes = warp == WARPS - 1 && newest < count;
  const i64 base = row * row_stride + (i64)head * head_stride + (i64)from * D;
  constexpr int N = Vec<T>::N, VECTORS = D / N;
  const u32 shared = shared_address(dynamic);
  // The tile that begins with key `low` of this block's share. All but the newest key were there before the step began.
  auto ask = [&](int low) {
    const u32 to = shared + (low / KEYS & 1) * 2 * KEYS * STRIDE;
    const int high = min(min(low + KEYS, count), newest);
    for (int i = low * VECTORS + threadIdx.x; i < high * VECTORS; i += THREADS) {
      const u32 place = to + i / VECTORS % KEYS * STRIDE + i % VECTORS * 16;
      copy_async16(place, keys + base + (i64)i * N, 16);
      copy_async16(place + KEYS * STRIDE, values + base + (i64)i * N, 16);
    }
    copy_async_commit();
  };
  auto add_newest = [&](int low) {
    if (!makes || newest / KEYS != low / KEYS) return;
    u8* to = dynamic + (low / KEYS & 1) * 2 * KEYS * STRIDE + newest % KEYS * STRIDE;
    for (int i = lane; i < D; i += 32) ((raw*)to)[i] = fresh[0][i], ((raw*)(to + KEYS * STRIDE))[i] = fresh[1][i];
  };
  // While the launch ahead still runs: the first keys, and the angles of this position.
  ask(0);
  float turn_cos[EACH], turn_sin[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = lane + e * 32;
    turn_cos[e] = i < rotary ? widen<T>(cos[row * rotary + i]) : 1.0f;
    turn_sin[e] = i < rotary ? widen<T>(sin[row * rotary + i]) : 0.0f;
  }
  settle();
  release();
  // One warp norms and rotates a head, with `x` in shared memory to exchange what stands half a rotation apart.
  auto turn = [&](const raw* head_at, const raw* by, float* x, auto put) {
    float v[EACH], square = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) v[e] = lane + e * 32 < D ? widen<T>(head_at[lane + e * 32]) : 0.0f;
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
  const raw* own = qkv + row * stride;
  for (int g = warp; g < G; g += WARPS)
    turn(own + (i64)(head * G + g) * D, q_norm, query[g], [&](int i, raw y) { query[g][i] = widen<T>(y) * scale; });
  if (makes) {
    const raw* v = own + (i64)(k_heads * (G + 1) + head) * D;
    raw *key_at = keys + base + (i64)newest * D, *value_at = values + base + (i64)newest * D;
    for (int i = lane; i < D; i += 32) value_at[i] = fresh[1][i] = v[i];
    turn(own + (i64)(k_heads * G + head) * D, k_norm, turned, [&](int i, raw y) { key_at[i] = fresh[0][i] = y; });
    __syncwarp();
  }
  add_newest(0);
  const int team = threadIdx.x / LANES, pair = threadIdx.x % LANES * 2;
  float acc[G][2] = {}, m[MINE], sum[MINE];
#pragma unroll
  for (int h = 0; h < MINE; ++h) m[h] = LOW, sum[h] = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      ask((tile + 1) * KEYS);
      add_newest((tile + 1) * KEYS);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const u8* here = dynamic + (tile & 1) * 2 * KEYS * STRIDE;
    const int inside = min(KEYS, count - tile * KEYS);
#pragma unroll
    for (int h = 0; h < MINE; ++h) {
      const int g = warp + h * WARPS;
      if (g < G) {
        float s = LOW;
        if (lane < inside) {
          const uint4* k = (const uint4*)(here + lane * STRIDE);
          float dot[2] = {};
#pragma unroll 4
          for (int i = 0; i < VECTORS; ++i) {
            float v[N];
            unpack<T>(k[i], v);
#pragma unroll
            for (int j = 0; j < N; j += 4) {
              const float4 w = *(const float4*)&query[g][i * N + j];
              dot[0] = fmaf(v[j], w.x, fmaf(v[j + 1], w.y, dot[0]));
              dot[1] = fmaf(v[j + 2], w.z, fmaf(v[j + 3], w.w, dot[1]));
            }
          }
          s = dot[0] + dot[1];
          if (softcap > 0.0f) s = tanhf(s / softcap) * softcap;
        }
        const float now = fmaxf(m[h], warp_max(s)), factor = exp2_fast((m[h] - now) * LOG2E);
        s = exp2_fast((s - now) * LOG2E);
        sum[h] = sum[h] * factor + warp_sum(s);
        m[h] = now;
        p[g][lane] = s;
        if (lane == 0) fade[g] = factor;
      }
    }
    __syncthreads();
    if (team < TEAMS) {
#pragma unroll
      for (int g = 0; g < G; ++g) acc[g][0] *= fade[g], acc[g][1] *= fade[g];
      const u8* value = here + KEYS * STRIDE + pair * SIZE;
      const int stop = min(inside, (team + 1) * RUN);
      for (int at = team * RUN; at < stop; at += 4) {
        float v[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j][0] = v[j][1] = 0.0f;  // past the end anything may lie; its weight is 0
          if (at + j < stop) two(value + (at + j) * STRIDE, v[j]);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
          const float4 w = *(const float4*)&p[g][at];
#pragma unroll
          for (int e = 0; e < 2; ++e)
            acc[g][e] = fmaf(w.x, v[0][e], fmaf(w.y, v[1][e], fmaf(w.z, v[2][e], fmaf(w.w, v[3][e], acc[g][e]))));
        }
      }
    }
    __syncthreads();
  }
  // The teams' shares, [TEAMS, G, D] floats, where keys and values were.
  float* shares = (float*)dynamic;
  if (team < TEAMS) {
#pragma unroll
    for (int g = 0; g < G; ++g) *(float2*)&shares[(team * G + g) * D + pair] = make_float2(acc[g][0], acc[g][1]);
  }
#pragma unroll
  for (int h = 0; h < MINE; ++h)
    if (warp + h * WARPS < G && lane == 0) top[warp + h * WARPS] = m[h], total[warp + h * WARPS] = sum[h];
  __syncthreads();
  raw* to = out + row * out_stride + (i64)head * G * D;
#if CLUSTERED
  for (int i = threadIdx.x; i < G * D; i += THREADS) {
#pragma unroll
    for (int t = 1; t < TEAMS; ++t) shares[i] += shares[t * G * D + i];
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
    for (int t = 0; t < TEAMS; ++t) y += shares[t * G * D + i];
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
  for (int g = warp; g < G; g += WARPS) {
    const float* one = all + ((i64)min(lane, chunks - 1) * G + g) * (D + 2);
    const float its = lane < chunks ? __ldcg(one) : LOW, w = exp2_fast((its - warp_max(its)) * LOG2E);
    if (lane < SPLITS) weight[g][lane] = w;
    const float all_of_it = warp_sum(w * (lane < chunks ? __ldcg(one + 1) : 0.0f));
    if (lane == 0) total[g] = all_of_it;
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
#endif
