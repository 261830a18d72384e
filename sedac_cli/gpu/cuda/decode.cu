// What a decode step does between its matrices: RMSNorm, rotary positions and the cache, attention over the cache.
// Constants: T, ENTRY (1 norm, 2 rotate, 3 attend, 4 norm with router); `attend`: D (head size), G (query heads per key head),
// KEYS, MAX_CHUNKS.

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
extern "C" __global__ void rms_norm(
    const raw* x, i64 x_stride, int width, const raw* weight, float eps, int plus_one, raw* out, i64 out_stride) {
  __shared__ float shared[32];
  settle();
  release();
  const raw* p = x + blockIdx.x * x_stride;
  raw* o = out + blockIdx.x * out_stride;
  constexpr int N = Vec<T>::N;
  const bool aligned = (((u64)p | (u64)o | (u64)weight) & 15) == 0;
  float square = 0.0f;
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    float v[N];
    unpack<T>(load_vec<T>(p + i, width - i, aligned), v);
#pragma unroll
    for (int j = 0; j < N; ++j) square = fmaf(v[j], v[j], square);
  }
  const float scale = rsqrtf(block_sum(square, shared) / width + eps);
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    float v[N], w[N];
    unpack<T>(load_vec<T>(p + i, width - i, aligned), v);
    unpack<T>(load_vec<T>(weight + i, width - i, aligned), w);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (i + j < width) o[i + j] = narrow<T>(plus_one ? v[j] * scale * (1.0f + w[j]) : rounded(v[j] * scale) * w[j]);
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
// Attention of one new token per row over the cache, which is read once. A block takes KEYS keys of one key head and all G
// query heads that share it: keys and values are asked for at once and lie in shared memory (one wait for memory instead of
// one per key); the block that ends last of a (row, key head) joins what the others left.
#define THREADS 256
#define SIZE (int)sizeof(raw)
#define STRIDE (D * SIZE + 16)     // bytes between keys: 16 more, so that lanes with a key each meet no bank twice
#define TAKERS (THREADS / KEYS)    // threads per key; each has every TAKERS-th query head
#define LANES (D / 2)              // threads that hold one value row, two elements each
#define TEAMS (THREADS / LANES)    // runs of keys whose values are summed at the same time
#define RUN ((KEYS / TEAMS + 3) / 4 * 4)
#define LOG2E 1.4426950408889634f
#define LOW (-__int_as_float(0x7f800000))

__device__ __forceinline__ void join_chunks(
    const float* all, int chunks, float (*weight)[MAX_CHUNKS], float* sums, raw* to) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int g = warp; g < G; g += THREADS / 32) {
    float m = LOW, sum = 0.0f;
    for (int c = lane; c < chunks; c += 32) m = fmaxf(m, __ldcg(all + ((i64)c * G + g) * (D + 2)));
#pragma unroll
    for (int d = 16; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, d));
    for (int c = lane; c < chunks; c += 32) {
      const float* one = all + ((i64)c * G + g) * (D + 2);
      const float w = exp2_fast((__ldcg(one) - m) * LOG2E);
      weight[g][c] = w;
      sum = fmaf(w, __ldcg(one + 1), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[g] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * D; i += THREADS) {
    const int g = i / D;
    const float* one = all + (i64)g * (D + 2) + 2 + i % D;
    float y = 0.0f;
#pragma unroll 8
    for (int c = 0; c < chunks; ++c) y = fmaf(weight[g][c], __ldcg(one + (i64)c * G * (D + 2)), y);
    to[i] = narrow<T>(y / sums[g]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const raw* q, i64 q_stride, const raw* keys, const raw* values, i64 row_stride, i64 head_stride, int k_heads,
    const i64* slot, const i64* first, int window, float scale, float softcap, float* partial, u32* counter, raw* out,
    i64 out_stride) {
  DYNAMIC_SHARED(dynamic);  // keys, then values: KEYS rows of STRIDE bytes each
  __shared__ __align__(16) float query[G][D];
  __shared__ __align__(16) float p[G][KEYS];
  __shared__ float top[G], total[G];
  __shared__ bool last;
  const int group = blockIdx.x, chunk = blockIdx.y, row = group / k_heads, head = group % k_heads;
  const int end = (int)*slot + 1;
  int begin = (int)first[row];
  if (window > 0) begin = max(begin, end - window);
  const int chunks = (end - begin + KEYS - 1) / KEYS;
  if (chunk >= chunks) {
    settle();
    return;
  }
  const int from = begin + chunk * KEYS, count = min(KEYS, end - from);
  const i64 base = row * row_stride + (i64)head * head_stride + (i64)from * D;
  constexpr int N = Vec<T>::N, VECTORS = D / N;
  const u32 shared = shared_address(dynamic);
  // All but the newest key and value were there before the step began: they are asked for while the launch ahead still runs.
  auto ask = [&](int half, int begin_at, int end_at) {
    const raw* source = (half ? values : keys) + base;
    for (int i = begin_at * VECTORS + threadIdx.x; i < end_at * VECTORS; i += THREADS)
      copy_async16(shared + (half * KEYS + i / VECTORS) * STRIDE + i % VECTORS * 16, source + (i64)i * N, 16);
  };
  const int old = min(count, end - 1 - from);
  ask(0, 0, old);
  ask(1, 0, old);
  settle();
  release();
  ask(0, old, count);
  ask(1, old, count);
  copy_async_commit();
  for (int i = threadIdx.x; i < G * D; i += THREADS) query[i / D][i % D] = widen<T>(q[row * q_stride + (i64)head * G * D + i]) * scale;
  copy_async_wait<0>();
  __syncthreads();
  const int key = threadIdx.x % KEYS, taker = threadIdx.x / KEYS;
  constexpr int MINE = (G + TAKERS - 1) / TAKERS;
  float dot[MINE] = {};
  if (key < count) {
    const uint4* k = (const uint4*)(dynamic + key * STRIDE);
#pragma unroll 4
    for (int i = 0; i < VECTORS; ++i) {
      float v[N];
      unpack<T>(k[i], v);
#pragma unroll
      for (int h = 0; h < MINE; ++h) {
        const int g = min(h * TAKERS + taker, G - 1);
#pragma unroll
        for (int j = 0; j < N; j += 4) {
          const float4 w = *(const float4*)&query[g][i * N + j];
          dot[h] = fmaf(v[j], w.x, fmaf(v[j + 1], w.y, fmaf(v[j + 2], w.z, fmaf(v[j + 3], w.w, dot[h]))));
        }
      }
    }
  }
#pragma unroll
  for (int h = 0; h < MINE; ++h) {
    const int g = h * TAKERS + taker;
    float s = dot[h];
    if (softcap > 0.0f) s = tanhf(s / softcap) * softcap;
    if (g < G) p[g][key] = key < count ? s : LOW;
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int g = warp; g < G; g += THREADS / 32) {
    float s[KEYS / 32], m = LOW, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) s[i] = p[g][lane + 32 * i], m = fmaxf(m, s[i]);
#pragma unroll
    for (int d = 16; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, d));
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) {
      s[i] = exp2_fast((s[i] - m) * LOG2E);
      sum += s[i];
      p[g][lane + 32 * i] = s[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) top[g] = m, total[g] = sum;
  }
  __syncthreads();
  // A team sums a run of keys; what lies past `count` has weight 0, but may hold anything: it is not read.
  const int team = threadIdx.x / LANES, pair = threadIdx.x % LANES * 2;
  float acc[G][2] = {};
  if (team < TEAMS) {
    const u8* value = dynamic + KEYS * STRIDE + pair * SIZE;
    const int stop = min(count, (team + 1) * RUN);
    for (int at = team * RUN; at < stop; at += 4) {
      float v[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j][0] = v[j][1] = 0.0f;
        if (at + j < stop) {
          const raw* one = (const raw*)(value + (at + j) * STRIDE);
          v[j][0] = widen<T>(one[0]), v[j][1] = widen<T>(one[1]);
        }
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
  // The teams' shares, [TEAMS, G, D] floats, where keys and values were.
  __syncthreads();
  float* shares = (float*)dynamic;
  if (team < TEAMS) {
#pragma unroll
    for (int g = 0; g < G; ++g) *(float2*)&shares[(team * G + g) * D + pair] = make_float2(acc[g][0], acc[g][1]);
  }
  __syncthreads();
  raw* to = out + row * out_stride + (i64)head * G * D;
  // [group, chunk, G, D + 2]: maximum, sum, weighted values.
  float* mine = partial + ((i64)group * gridDim.y + chunk) * G * (D + 2);
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
  if (last) join_chunks(partial + (i64)group * gridDim.y * G * (D + 2), chunks, (float(*)[MAX_CHUNKS])dynamic, total, to);
}
#endif

#if ENTRY == 4
// RMSNorm and the learned gate's router in one launch: y = norm(x), score = w . n + u . silu(V n) + c with n = layer_norm(y)
// without weights, run = !(score > t). A block norms the whole row but writes, and multiplies with the router, only its
// SLICE of it; the block that ends last of a row adds up. Sums of y and y^2 give layer_norm's mean and variance: y comes out
// of an RMSNorm, so its mean is small against its deviation and nothing cancels.
// Constants: T, SLICE (a multiple of 256), UNITS (1 + hidden units, padded to a multiple of 8).
#define THREADS 256
#define EACH (UNITS / 8)  // products per warp
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
  settle();
  release();
  const raw* p = x + row * x_stride;
  constexpr int N = Vec<T>::N;
  const bool aligned = ((u64)p & 15) == 0;
  float square = 0.0f;
  for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
    float v[N];
    unpack<T>(load_vec<T>(p + i, width - i, aligned), v);
#pragma unroll
    for (int j = 0; j < N; ++j) square = fmaf(v[j], v[j], square);
  }
  const float scale = rsqrtf(block_sum(square, shared) / width + eps);
  float sum = 0.0f;
  square = 0.0f;
  for (int i = threadIdx.x; i < SLICE; i += THREADS) {
    float y = 0.0f;
    if (from + i < width) {
      const float v = widen<T>(p[from + i]), g = widen<T>(weight[from + i]);
      const raw stored = narrow<T>(plus_one ? v * scale * (1.0f + g) : rounded(v * scale) * g);
      out[row * out_stride + from + i] = stored;
      y = widen<T>(stored);
    }
    slice[i] = y;
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
    for (int u = 1 + lane; u <= units; u += 32) {
      const float z = (products[u] - mean * __ldg(outer + units + u)) * rate;  // after `outer`: each row's sum of weights
      score = fmaf(__ldg(outer + u - 1), z / (1.0f + __expf(-z)), score);
    }
    score = warp_sum(score) + (products[0] - mean * __ldg(outer + units)) * rate + __ldg(bias);
    const bool run = !(score > number(threshold_at, threshold)) || (may_skip && !may_skip[row]);
    if (lane == 0) score_out[row] = score, run_out[row] = run;
    need = run && (!real || real[row]);
  }
  publish_need(need, counter, gridDim.y, needs, handles, handle_count, has_opposite);
}
#endif
