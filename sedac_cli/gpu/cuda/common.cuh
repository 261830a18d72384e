// What every kernel file shares: element types, row addressing, warp sums, and how blocks of one launch meet.
// Element kinds: 0 = float32, 1 = float16, 2 = bfloat16 (the Python side passes them as constants).

template <int KIND> struct Elem { typedef u16 raw; };
template <> struct Elem<0> { typedef u32 raw; };

template <int KIND> struct Vec { static constexpr int N = KIND == 0 ? 4 : 8; };  // elements in 16 bytes

template <int KIND>
__device__ __forceinline__ float widen(typename Elem<KIND>::raw raw) {
  if constexpr (KIND == 0) return __uint_as_float(raw);
  else if constexpr (KIND == 1) return half_to_float(raw);
  else return __uint_as_float((u32)raw << 16);
}

template <int KIND>
__device__ __forceinline__ typename Elem<KIND>::raw narrow(float x) {
  if constexpr (KIND == 0) return __float_as_uint(x);
  else if constexpr (KIND == 1) return float_to_half(x);
  else return float_to_bfloat(x);
}

template <int KIND>
__device__ __forceinline__ void unpack(const uint4& q, float (&v)[Vec<KIND>::N]) {
  const u32 word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (KIND == 0) {
      v[i] = __uint_as_float(word[i]);
    } else {
      v[2 * i] = widen<KIND>((u16)(word[i] & 0xffffu));
      v[2 * i + 1] = KIND == 2 ? __uint_as_float(word[i] & 0xffff0000u) : widen<KIND>((u16)(word[i] >> 16));
    }
  }
}

template <int KIND>
__device__ __forceinline__ uint4 pack(const float (&v)[Vec<KIND>::N]) {
  u32 word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (KIND == 0) word[i] = __float_as_uint(v[i]);
    else word[i] = (u32)narrow<KIND>(v[2 * i]) | (u32)narrow<KIND>(v[2 * i + 1]) << 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// The sum, rounded to the element type: what a residual stream carries on.
template <int KIND>
__device__ __forceinline__ uint4 add_vec(const uint4& a, const uint4& b) {
  float x[Vec<KIND>::N], y[Vec<KIND>::N];
  unpack<KIND>(a, x);
  unpack<KIND>(b, y);
#pragma unroll
  for (int j = 0; j < Vec<KIND>::N; ++j) x[j] += y[j];
  return pack<KIND>(x);
}

// One vector of a row that may be unaligned, or end inside the vector: missing elements are 0. FRESH: what the launch ahead may
// have written while this one had begun already, which must not come by way of the read-only cache.
template <int KIND, bool FRESH = false>
__device__ __forceinline__ uint4 load_vec(const typename Elem<KIND>::raw* p, int valid, bool aligned) {
  if (aligned && valid >= Vec<KIND>::N) return FRESH ? *(const uint4*)p : __ldg((const uint4*)p);
  u32 word[4] = {0u, 0u, 0u, 0u};
#pragma unroll
  for (int i = 0; i < Vec<KIND>::N; ++i) {
    if (i < valid) {
      if constexpr (KIND == 0) word[i] = p[i];
      else word[i / 2] |= (u32)p[i] << (16 * (i & 1));
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <int KIND>
__device__ __forceinline__ void store_vec(typename Elem<KIND>::raw* p, const uint4& q, int valid, bool aligned) {
  if (aligned && valid >= Vec<KIND>::N) {
    *(uint4*)p = q;
    return;
  }
  const u32 word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < Vec<KIND>::N; ++i) {
    if (i < valid) {
      if constexpr (KIND == 0) p[i] = word[i];
      else p[i] = (u16)(word[i / 2] >> (16 * (i & 1)));
    }
  }
}

// Rows of a [rows, width] or [batch, seq, width] tensor with any strides on the leading axes.
struct Rows {
  i64 outer, inner;  // strides, in elements
  int per_outer;     // rows that share one step of `outer`
  __device__ __forceinline__ i64 offset(int row) const {
    return (i64)(row / per_outer) * outer + (i64)(row % per_outer) * inner;
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

// Sums over a block; `shared` has a float for each per warp, and may be used again at once.
template <int COUNT>
__device__ __forceinline__ void block_sums(float (&x)[COUNT], float* shared) {
  const int warps = (blockDim.x + 31) / 32;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] = warp_sum(x[i]);
  __syncthreads();  // the last sums' readers are done
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (threadIdx.x % 32 == 0) shared[i * warps + threadIdx.x / 32] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    x[i] = 0.0f;
    for (int w = 0; w < warps; ++w) x[i] += shared[i * warps + w];
  }
}
__device__ __forceinline__ float block_sum(float x, float* shared) {
  float sums[1] = {x};
  block_sums(sums, shared);
  return sums[0];
}

#ifdef T
__device__ __forceinline__ float rounded(float x) { return widen<T>(narrow<T>(x)); }

// An RMSNorm's squares are summed by its first 256 threads, 16 bytes at a time, whichever kernel does it: the same row then gets
// the same scale to the bit. `load(r, i)`: 16 bytes of row r from element i on. `shared` has a float per warp and row.
#define NORM_THREADS 256
template <int COUNT, class Load>
__device__ __forceinline__ void norm_scales(float (&scale)[COUNT], int width, float eps, float* shared, Load load) {
  constexpr int N = Vec<T>::N;
  float square[COUNT] = {};
  if (threadIdx.x < NORM_THREADS) {
#pragma unroll 2
    for (int i = threadIdx.x * N; i < width; i += NORM_THREADS * N)
#pragma unroll
      for (int r = 0; r < COUNT; ++r) {
        float v[N];
        unpack<T>(load(r, i), v);
#pragma unroll
        for (int j = 0; j < N; ++j) square[r] = fmaf(v[j], v[j], square[r]);
      }
  }
  block_sums(square, shared);
#pragma unroll
  for (int r = 0; r < COUNT; ++r) scale[r] = rsqrtf(square[r] / width + eps);
}

template <class Load>
__device__ __forceinline__ float norm_scale(int width, float eps, float* shared, Load load) {
  float scale[1];
  norm_scales(scale, width, eps, shared, [&](int, int i) { return load(i); });
  return scale[0];
}

// `plus_one`: (1 + weight), all in float32, rounded once (Gemma); otherwise rounded before the weight.
__device__ __forceinline__ float normed(float value, float scale, float weight, int plus_one) {
  return plus_one ? value * scale * (1.0f + weight) : rounded(value * scale) * weight;
}
#endif

// True, in every thread, for the block that arrives last of `expected`; all that the others wrote before is then visible.
// The counter wraps to 0 by itself: no memset between launches, so a replayed graph needs none either.
__device__ __forceinline__ bool arrive_last(u32* counter, u32 expected) {
  __shared__ bool last;
  __syncthreads();
  // One fence speaks for the block: what a barrier ordered before it is published with it, and 255 fences are saved.
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, expected - 1) == expected - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// A number that is a constant of the launch, or lives on the device, where the launch ahead may have changed it.
__device__ __forceinline__ float number(const float* pointer, float value) { return pointer ? *pointer : value; }

#ifdef SET_CONDITION
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(u64 handle, unsigned int value);
#endif

// Arms IF nodes: handles[0..count) get `value`, handles[count..2*count) its opposite where the graph has such nodes.
__device__ __forceinline__ void arm_nodes(const u64* handles, int count, int has_opposite, bool value, int lane, int lanes) {
#ifdef SET_CONDITION
  for (int i = lane; i < count; i += lanes) {
    cudaGraphSetConditional(handles[i], value ? 1u : 0u);
    if (has_opposite) cudaGraphSetConditional(handles[count + i], value ? 0u : 1u);
  }
#endif
}

// "Does any token need the MLP?" over all blocks of a launch, in one atomic per block: the low half of *scratch counts blocks,
// the high half those that say yes; it ends at 0. Every thread of the block calls it with its own answer.
__device__ __forceinline__ void publish_need(
    bool mine, u32* scratch, u32 blocks, int* needs, const u64* handles, int count, int has_opposite) {
  if (!needs && !count) return;
  __shared__ int verdict;
  const int any = __syncthreads_or(mine);
  if (threadIdx.x == 0) {
    verdict = any;
    if (blocks > 1) {
      const u32 before = atomicAdd(scratch, any ? 0x10001u : 1u);
      if ((before & 0xffffu) == blocks - 1) {
        verdict = any || before >> 16;
        *scratch = 0u;  // nobody else is left; the next launch sees it
      } else {
        verdict = -1;  // another block will speak
      }
    }
    if (needs && verdict >= 0) *needs = verdict;
  }
  if (!count) return;
  __syncthreads();
  if (verdict >= 0) arm_nodes(handles, count, has_opposite, verdict != 0, threadIdx.x, blockDim.x);
}
