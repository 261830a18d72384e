// What a decode step does between its matrices: RMSNorm, rotary positions and the cache, attention over the cache.
// Constants: T, ENTRY (1 norm, 2 rotate, 3 attend, 4 norm with router); `attend`: D (head size), G (query heads per key head),
// KEYS, SPLITS (both up to 32).

typedef Elem<T>::raw raw;

__device__ __forceinline__ float rounded(float x) { return widen<T>(narrow<T>(x)); }

__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < (int)(blockDim.x + 31) / 32; ++w) total += shared[w];
  return total;
}

#if ENTRY == 1
// One block per row. `plus_one`: (1 + weight), all in float32, rounded once (Gemma); otherwise rounded before the weight.
// The weight depends on nothing: it is on its way while the launch ahead still runs. HELD vectors of both stay in registers.
#define HELD 2
extern "C" __global__ void rms_norm(
    const raw* x, i64 x_stride, int width, const raw* weight, float eps, int plus_one, raw* out, i64 out_stride) {
  __shared__ float shared[32];
  const raw* p = x + blockIdx.x * x_stride;
  raw* o = out + blockIdx.x * out_stride;
  constexpr int N = Vec<T>::N;
  const int stride = blockDim.x * N, begin = threadIdx.x * N;
  const bool aligned = (((u64)p | (u64)o | (u64)weight) & 15) == 0;
  float w[HELD][N], v[HELD][N];
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if (begin + h * stride < width) unpack<T>(load_vec<T>(weight + begin + h * stride, width - begin - h * stride, aligned), w[h]);
  settle();
  release();
  float square = 0.0f;
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if (begin + h * stride < width) {
      unpack<T>(load_vec<T, true>(p + begin + h * stride, width - begin - h * stride, aligned), v[h]);
#pragma unroll
      for (int j = 0; j < N; ++j) square = fmaf(v[h][j], v[h][j], square);
    }
  for (int i = begin + HELD * stride; i < width; i += stride) {
    float more[N];
    unpack<T>(load_vec<T, true>(p + i, width - i, aligned), more);
#pragma unroll
    for (int j = 0; j < N; ++j) square = fmaf(more[j], more[j], square);
  }
  const float scale = rsqrtf(block_sum(square, shared) / width + eps);
  auto write = [&](int i, const float (&value)[N], const float (&by)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (i + j < width)
        o[i + j] = narrow<T>(plus_one ? value[j] * scale * (1.0f + by[j]) : rounded(value[j] * scale) * by[j]);
  };
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    if (begin + h * stride < width) write(begin + h * stride, v[h], w[h]);
  for (int i = begin + HELD * stride; i < width; i += stride) {
    float more[N], by[N];
    unpack<T>(load_vec<T, true>(p + i, width - i, aligned), more);
    unpack<T>(load_vec<T>(weight + i, width - i, aligned), by);
    write(i, more, by);
  }
}
#endif

#if ENTRY == 2
// Rows of `qkv` hold q heads, k heads, v heads of `size` each. q is rotated in place; k, rotated, and v go to the cache at
// *slot. With q_norm, k_norm: an RMSNorm over each head first. One block per (head, row); thread i has elements i, i + half.
extern "C" __global__ void rotate(
    raw* qkv, i64 stride, int q_heads, int k_heads, int size, int rotary, const raw* cos, const raw* sin, const raw* q_norm,
    const raw* k_norm, float eps, raw* keys, raw* values, i64 row_stride, i64 head_stride, const i64* slot) {
  __shared__ float shared[32];
  __shared__ float head_values[512];
  settle();
  release();
  const int head = blockIdx.x, row = blockIdx.y;
  raw* p = qkv + row * stride + (i64)head * size;
  const bool is_q = head < q_heads, is_v = head >= q_heads + k_heads;
  if (is_v) {
    raw* to = values + row * row_stride + (i64)(head - q_heads - k_heads) * head_stride + *slot * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) to[i] = p[i];
    return;
  }
  const raw* weight = is_q ? q_norm : k_norm;
  if (weight) {
    float square = 0.0f;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const float v = widen<T>(p[i]);
      square = fmaf(v, v, square);
    }
    const float scale = rsqrtf(block_sum(square, shared) / size + eps);
    for (int i = threadIdx.x; i < size; i += blockDim.x)
      head_values[i] = rounded(rounded(widen<T>(p[i]) * scale) * widen<T>(weight[i]));
  } else {
    for (int i = threadIdx.x; i < size; i += blockDim.x) head_values[i] = widen<T>(p[i]);
  }
  __syncthreads();
  raw* to = is_q ? p : keys + row * row_stride + (i64)(head - q_heads) * head_stride + *slot * size;
  const int half = rotary / 2;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    float y = head_values[i];
    if (i < rotary) {
      const float other = i < half ? -head_values[i + half] : head_values[i - half];
      y = rounded(y * widen<T>(cos[row * rotary + i])) + rounded(other * widen<T>(sin[row * rotary + i]));
    }
    to[i] = narrow<T>(y);
  }
}
#endif

#if ENTRY == 3
// Attention of one new token per row over the cache, which is read once. The keys of a (row, key head) are shared out over up
// to SPLITS blocks, each for all G query heads; a block goes through its share KEYS at a time, one tile ahead in shared memory.
// Lane k of a warp scores key k for the warp's own heads, so maxima and sums stay within the warp. The block that ends last
// joins what the others left.
#define THREADS 256
#define WARPS (THREADS / 32)
#define SIZE (int)sizeof(raw)
#define STRIDE (D * SIZE + 16)     // bytes between keys: 16 more, so that lanes with a key each meet no bank twice
#define MINE ((G + WARPS - 1) / WARPS)
#define LANES (D / 2)              // threads that hold one value row, two elements each
#define TEAMS (THREADS / LANES)    // runs of keys whose values are summed at the same time
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

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const raw* q, i64 q_stride, const raw* keys, const raw* values, i64 row_stride, i64 head_stride, int k_heads,
    const i64* slot, const i64* first, int window, float scale, float softcap, float* partial, u32* counter, raw* out,
    i64 out_stride) {
  DYNAMIC_SHARED(dynamic);  // two tiles, each of keys and values: KEYS rows of STRIDE bytes
  __shared__ __align__(16) float query[G][D];
  __shared__ __align__(16) float p[G][32];
  __shared__ float fade[G], top[G], total[G], weight[G][SPLITS];
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
  const i64 base = row * row_stride + (i64)head * head_stride + (i64)from * D;
  constexpr int N = Vec<T>::N, VECTORS = D / N;
  const u32 shared = shared_address(dynamic);
  // Keys [low, high) of this block's share, which lie in one tile.
  auto ask = [&](int low, int high) {
    const u32 to = shared + (low / KEYS & 1) * 2 * KEYS * STRIDE;
    for (int i = low * VECTORS + threadIdx.x; i < high * VECTORS; i += THREADS) {
      const u32 place = to + i / VECTORS % KEYS * STRIDE + i % VECTORS * 16;
      copy_async16(place, keys + base + (i64)i * N, 16);
      copy_async16(place + KEYS * STRIDE, values + base + (i64)i * N, 16);
    }
  };
  // All but the newest key were there before the step began: they are asked for while the launch ahead still runs.
  const int before = min(min(KEYS, count), end - 1 - from);
  ask(0, before);
  settle();
  release();
  ask(before, min(KEYS, count));
  copy_async_commit();
  for (int i = threadIdx.x; i < G * D; i += THREADS) query[i / D][i % D] = widen<T>(q[row * q_stride + (i64)head * G * D + i]) * scale;
  const int team = threadIdx.x / LANES, pair = threadIdx.x % LANES * 2;
  float acc[G][2] = {}, m[MINE], sum[MINE];
#pragma unroll
  for (int h = 0; h < MINE; ++h) m[h] = LOW, sum[h] = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) ask((tile + 1) * KEYS, min((tile + 2) * KEYS, count));
    copy_async_commit();
    copy_async_wait<1>();
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
  for (int g = warp; g < G; g += WARPS) {
    const float* one = all + ((i64)min(lane, chunks - 1) * G + g) * (D + 2);
    const float its = lane < chunks ? __ldcg(one) : LOW, w = exp2_fast((its - warp_max(its)) * LOG2E);
    if (lane < SPLITS) weight[g][lane] = w;
    const float all_of_it = warp_sum(w * (lane < chunks ? __ldcg(one + 1) : 0.0f));
    if (lane == 0) total[g] = all_of_it;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * D; i += THREADS) {
    const float* one = all + (i64)(i / D) * (D + 2) + 2 + i % D;
    float y = 0.0f;
#pragma unroll 8
    for (int c = 0; c < chunks; ++c) y = fmaf(weight[i / D][c], __ldcg(one + (i64)c * G * (D + 2)), y);
    to[i] = narrow<T>(y / total[i / D]);
  }
}
#endif

#if ENTRY == 4
// RMSNorm and the learned gate's router in one launch: y = norm(x), score = w . n + u . silu(V n) + c with n = layer_norm(y)
// without weights, run = !(score > t). A block norms the whole row but writes, and multiplies with the router, only its
// SLICE of it; the block that ends last of a row adds up. Sums of y and y^2 give layer_norm's mean and variance: y comes out
// of an RMSNorm, so its mean is small against its deviation and nothing cancels.
// `outer` holds the outer weights and, after them, the sum of each row of `matrix`.
// Constants: T, SLICE (a multiple of 256), UNITS (1 + hidden units, padded to a multiple of 8).
#define THREADS 256
#define EACH (UNITS / 8)  // products per warp
#define MORE ((UNITS + 31) / 32)
extern "C" __global__ void __launch_bounds__(THREADS) norm_route(
    const raw* x, i64 x_stride, int width, const raw* weight, float eps, int plus_one, raw* out, i64 out_stride,
    const float* matrix, int padded, const float* outer, int units, const float* bias, float norm_eps, float* partial,
    u32* counter, const float* threshold_at, float threshold, float* score_out, u8* run_out, const u8* may_skip,
    const u8* real, int* needs, const u64* handles, int handle_count, int has_opposite) {
  __shared__ __align__(16) float slice[SLICE];
  __shared__ float shared[32], products[UNITS + 2];
  __shared__ bool last;
  const int row = blockIdx.y, from = blockIdx.x * SLICE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The router's weights depend on nothing: they are on their way while the row is normed.
  float4 w[EACH][SLICE / 128];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int unit = warp + e * 8;
#pragma unroll
    for (int i = 0; i < SLICE / 128; ++i) {
      const int at = from + (lane + i * 32) * 4;
      w[e][i] = unit <= units && at < padded ? __ldg((const float4*)(matrix + (i64)unit * padded + at)) : make_float4(0, 0, 0, 0);
    }
  }
  float norm_weight[SLICE / THREADS];
#pragma unroll
  for (int i = 0; i < SLICE / THREADS; ++i) {
    const int at = from + threadIdx.x + i * THREADS;
    norm_weight[i] = at < width ? widen<T>(weight[at]) : 0.0f;
  }
  // What the end of the row needs, by the warp that will need it.
  float outer_weight[MORE], row_sum[MORE], base = 0.0f, base_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < MORE; ++i) outer_weight[i] = row_sum[i] = 0.0f;
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < MORE; ++i) {
      const int u = 1 + lane + i * 32;
      if (u <= units) outer_weight[i] = __ldg(outer + u - 1), row_sum[i] = __ldg(outer + units + u);
    }
    base = __ldg(bias), base_sum = __ldg(outer + units);
  }
  settle();
  release();
  const raw* p = x + row * x_stride;
  constexpr int N = Vec<T>::N;
  const bool aligned = ((u64)p & 15) == 0;
  const bool may = !may_skip || may_skip[row], counts = !real || real[row];
  const float limit = number(threshold_at, threshold);
  raw own[SLICE / THREADS];
#pragma unroll
  for (int i = 0; i < SLICE / THREADS; ++i) own[i] = p[min(from + (int)threadIdx.x + i * THREADS, width - 1)];
  float square = 0.0f;
#pragma unroll 2
  for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
    float v[N];
    unpack<T>(load_vec<T, true>(p + i, width - i, aligned), v);
#pragma unroll
    for (int j = 0; j < N; ++j) square = fmaf(v[j], v[j], square);
  }
  const float scale = rsqrtf(block_sum(square, shared) / width + eps);
  float sum = 0.0f;
  square = 0.0f;
#pragma unroll
  for (int i = 0; i < SLICE / THREADS; ++i) {
    const int in_slice = threadIdx.x + i * THREADS;
    float y = 0.0f;
    if (from + in_slice < width) {
      const float v = widen<T>(own[i]), g = norm_weight[i];
      const raw stored = narrow<T>(plus_one ? v * scale * (1.0f + g) : rounded(v * scale) * g);
      out[row * out_stride + from + in_slice] = stored;
      y = widen<T>(stored);
    }
    slice[in_slice] = y;
    sum += y;
    square = fmaf(y, y, square);
  }
  __syncthreads();  // `shared` has been read, `slice` is there
  sum = block_sum(sum, shared);
  __syncthreads();
  square = block_sum(square, shared);
  float* mine = partial + ((i64)row * gridDim.x + blockIdx.x) * (UNITS + 2);
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < SLICE / 128; ++i) {
      const float4 v = *(const float4*)&slice[(lane + i * 32) * 4];
      dot = fmaf(w[e][i].x, v.x, fmaf(w[e][i].y, v.y, fmaf(w[e][i].z, v.z, fmaf(w[e][i].w, v.w, dot))));
    }
    dot = warp_sum(dot);
    if (lane == 0) mine[warp + e * 8] = dot;
  }
  if (threadIdx.x == 0) mine[UNITS] = sum, mine[UNITS + 1] = square;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter + 1 + row, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  for (int u = threadIdx.x; u < UNITS + 2; u += THREADS) {
    const float* one = partial + (i64)row * gridDim.x * (UNITS + 2) + u;
    float y = 0.0f;
#pragma unroll 16
    for (int b = 0; b < (int)gridDim.x; ++b) y += __ldcg(one + (i64)b * (UNITS + 2));
    products[u] = y;
  }
  __syncthreads();
  bool need = false;
  if (warp == 0) {
    const float mean = products[UNITS] / width, rate = rsqrtf(products[UNITS + 1] / width - mean * mean + norm_eps);
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < MORE; ++i) {
      const int u = 1 + lane + i * 32;
      if (u > units) continue;
      const float z = (products[u] - mean * row_sum[i]) * rate;
      score = fmaf(outer_weight[i], z / (1.0f + __expf(-z)), score);
    }
    score = warp_sum(score) + (products[0] - mean * base_sum) * rate + base;
    const bool run = !(score > limit) || !may;
    if (lane == 0) score_out[row] = score, run_out[row] = run;
    need = run && counts;
  }
  publish_need(need, counter, gridDim.y, needs, handles, handle_count, has_opposite);
}
#endif
