// What a decode step does between its matrices: RMSNorm, rotary positions and the cache, attention over the cache.
// Constants: T, ENTRY (1 norm, 2 rotate, 3 attend), and for `attend` D (head size) and G (query heads per key head).

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
// Attention of one new token per row over the cache, which is read once. A block takes 128 keys of one key head and all G
// query heads that share it; the block that ends last of a (row, key head) joins what the others left.
#define KEYS 128
#define LANES (D / 2)             // lanes that hold one value row, two elements each
#define TEAMS (KEYS / LANES)      // keys whose values are read at the same time
extern "C" __global__ void __launch_bounds__(KEYS) attend(
    const raw* q, i64 q_stride, const raw* keys, const raw* values, i64 row_stride, i64 head_stride, int k_heads,
    const i64* slot, const i64* first, int window, float scale, float softcap, float* partial, u32* counter, raw* out,
    i64 out_stride) {
  __shared__ __align__(16) float query[G][D];
  __shared__ __align__(16) float p[G][KEYS];
  __shared__ float top[G], total[G];
  __shared__ bool last;
  const int group = blockIdx.x, chunk = blockIdx.y, row = group / k_heads, head = group % k_heads;
  const int end = (int)*slot + 1;
  int begin = (int)first[row];
  if (window > 0) begin = max(begin, end - window);
  const int chunks = (end - begin + KEYS - 1) / KEYS;
  if (chunk >= chunks) return;
  const int from = begin + chunk * KEYS, count = min(KEYS, end - from);
  for (int i = threadIdx.x; i < G * D; i += KEYS) query[i / D][i % D] = widen<T>(q[row * q_stride + (i64)head * G * D + i]) * scale;
  __syncthreads();
  constexpr int N = Vec<T>::N;
  const i64 base = row * row_stride + (i64)head * head_stride + (i64)from * D;
  float dot[G] = {};
  if ((int)threadIdx.x < count) {
    const raw* key = keys + base + (i64)threadIdx.x * D;
#pragma unroll 4
    for (int i = 0; i < D; i += N) {
      float v[N];
      unpack<T>(__ldg((const uint4*)(key + i)), v);
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int j = 0; j < N; j += 4) {
          const float4 w = *(const float4*)&query[g][i + j];
          dot[g] = fmaf(v[j], w.x, fmaf(v[j + 1], w.y, fmaf(v[j + 2], w.z, fmaf(v[j + 3], w.w, dot[g]))));
        }
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float s = dot[g];
    if (softcap > 0.0f) s = tanhf(s / softcap) * softcap;
    p[g][threadIdx.x] = (int)threadIdx.x < count ? s : -__int_as_float(0x7f800000);
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int g = warp; g < G; g += KEYS / 32) {
    float s[4], m = -__int_as_float(0x7f800000), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = p[g][lane + 32 * i], m = fmaxf(m, s[i]);
#pragma unroll
    for (int d = 16; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, d));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = exp2_fast((s[i] - m) * 1.4426950408889634f);
      sum += s[i];
      p[g][lane + 32 * i] = s[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) top[g] = m, total[g] = sum;
  }
  __syncthreads();
  const int team = threadIdx.x / LANES, pair = threadIdx.x % LANES * 2;
  float acc[G][2] = {};
  if (team < TEAMS) {
    const raw* value = values + base + pair;
    for (int key = team; key < count; key += TEAMS) {
      float v0, v1;
      if constexpr (T == 0) {
        const float2 q2 = __ldg((const float2*)(value + (i64)key * D));
        v0 = q2.x, v1 = q2.y;
      } else {
        const u32 word = __ldg((const u32*)(value + (i64)key * D));
        v0 = widen<T>((raw)(word & 0xffffu)), v1 = widen<T>((raw)(word >> 16));
      }
#pragma unroll
      for (int g = 0; g < G; ++g) acc[g][0] = fmaf(p[g][key], v0, acc[g][0]), acc[g][1] = fmaf(p[g][key], v1, acc[g][1]);
    }
  }
  // The teams' shares: p has been read by then, and query has room for one team at a time.
  for (int other = 0; other < TEAMS; ++other) {
    __syncthreads();
    if (team == other) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        query[g][pair] = (other ? query[g][pair] : 0.0f) + acc[g][0];
        query[g][pair + 1] = (other ? query[g][pair + 1] : 0.0f) + acc[g][1];
      }
    }
  }
  __syncthreads();
  raw* to = out + row * out_stride + (i64)head * G * D;
  if (chunks == 1) {
    for (int i = threadIdx.x; i < G * D; i += KEYS) to[i] = narrow<T>(query[i / D][i % D] / total[i / D]);
    return;
  }
  // [group, chunk, G, D + 2]: maximum, sum, weighted values.
  float* mine = partial + ((i64)group * gridDim.y + chunk) * G * (D + 2);
  for (int i = threadIdx.x; i < G * D; i += KEYS) mine[i / D * (D + 2) + 2 + i % D] = query[i / D][i % D];
  if ((int)threadIdx.x < G) mine[threadIdx.x * (D + 2)] = top[threadIdx.x], mine[threadIdx.x * (D + 2) + 1] = total[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter + group, chunks - 1) == (u32)chunks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const float* all = partial + (i64)group * gridDim.y * G * (D + 2);
  for (int i = threadIdx.x; i < G * D; i += KEYS) {
    const int g = i / D;
    float m = -__int_as_float(0x7f800000), sum = 0.0f, y = 0.0f;
    for (int c = 0; c < chunks; ++c) {
      const float* one = all + ((i64)c * G + g) * (D + 2);
      const float its = __ldcg(one), now = fmaxf(m, its);
      const float a = exp2_fast((m - now) * 1.4426950408889634f), b = exp2_fast((its - now) * 1.4426950408889634f);
      sum = sum * a + __ldcg(one + 1) * b;
      y = y * a + __ldcg(one + 2 + i % D) * b;
      m = now;
    }
    to[i] = narrow<T>(y / sum);
  }
}
#endif
