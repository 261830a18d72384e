// Entropy in bits, largest probability and argmax of each row of logits, in one read of the logits.
//
// H = log2 S - T / S with S = sum 2^d, T = sum 2^d d, d = (v - max) log2 e, kept online: one exponential per logit.
// The rows*vocab logits are cut into equal spans, one per block, whatever the number of rows: one row fills the chip as well
// as a thousand. A row that crosses blocks leaves partial states; the block that arrives last joins them.
// DECISION adds one small block per row for |h| and |h - prev|; it arrives like any other part of the row.
// Constants: T (logits), HT (hidden), DECISION, UNROLL (loads in flight per thread), BLOCKS per multiprocessor.

#define THREADS 256
#define LOG2E 1.4426950408889634f
#define LOWEST (-3.4028234663852886e38f)
#define NEG_INF (-__int_as_float(0x7f800000))
#define FLOOR (-200.0f)  // 2^-200 is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN
#define NO_INDEX 0x7fffffff

struct State {
  float m, s, t;  // maximum, S, T
  int index;      // of the first maximum
};

__device__ __forceinline__ void lift(State& p, float m) {
  const float d = fmaxf((p.m - m) * LOG2E, FLOOR), a = exp2_fast(d);
  p.t = a * fmaf(p.s, d, p.t);
  p.s *= a;
}

__device__ __forceinline__ State join(State a, State b) {
  const float m = fmaxf(fmaxf(a.m, b.m), LOWEST);  // finite, so that -inf - -inf never happens
  lift(a, m);
  lift(b, m);
  State r;
  r.m = fmaxf(a.m, b.m);
  r.s = a.s + b.s;
  r.t = a.t + b.t;
  r.index = a.m > b.m ? a.index : b.m > a.m ? b.index : min(a.index, b.index);
  return r;
}

template <int N>
__device__ __forceinline__ void push(State& p, const float (&v)[N], int base) {
  float top = v[0];
#pragma unroll
  for (int j = 1; j < N; ++j) top = fmaxf(top, v[j]);
  if (top > p.m) {  // rare after the first few vectors, so the search for the index costs nothing
    lift(p, top);
    p.m = top;
    int k = 0;
#pragma unroll
    for (int j = N - 1; j >= 0; --j)
      if (v[j] == top) k = j;
    p.index = base + k;
  }
  const float m = fmaxf(p.m, LOWEST);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float d = max_or_nan((v[j] - m) * LOG2E, FLOOR), e = exp2_fast(d);
    p.s += e;
    p.t = fmaf(e, d, p.t);
  }
}

__device__ __forceinline__ State warp_join(State p) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    State o;
    o.m = __shfl_xor_sync(0xffffffffu, p.m, d);
    o.s = __shfl_xor_sync(0xffffffffu, p.s, d);
    o.t = __shfl_xor_sync(0xffffffffu, p.t, d);
    o.index = __shfl_xor_sync(0xffffffffu, p.index, d);
    p = join(p, o);
  }
  return p;
}

__device__ __forceinline__ State empty_state() {
  State p;
  p.m = NEG_INF;
  p.s = p.t = 0.0f;
  p.index = NO_INDEX;
  return p;
}

// The state of `count` logits from `p`, in every lane of warp 0. `base` is the index of p[0] in its row.
__device__ __forceinline__ State scan(const typename Elem<T>::raw* p, int count, int base) {
  constexpr int N = Vec<T>::N, SIZE = 16 / N;
  State state = empty_state();
  const int tid = threadIdx.x;
  const int head = min((int)(((16 - ((u64)p & 15)) & 15) / SIZE), count);
  const int vectors = (count - head) / N, tail = count - head - vectors * N;
  if (tid < head) {
    const float v[1] = {widen<T>(p[tid])};
    push(state, v, base + tid);
  }
  const uint4* body = (const uint4*)(p + head);
  for (int i = tid; i < vectors; i += UNROLL * THREADS) {
    uint4 q[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * THREADS < vectors) q[u] = __ldcs(body + i + u * THREADS);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (i + u * THREADS < vectors) {
        float v[N];
        unpack<T>(q[u], v);
        push(state, v, base + head + (i + u * THREADS) * N);
      }
    }
  }
  if (tid < tail) {
    const int k = head + vectors * N + tid;
    const float v[1] = {widen<T>(p[k])};
    push(state, v, base + k);
  }
  __shared__ State warps[THREADS / 32];
  state = warp_join(state);
  __syncthreads();  // the previous segment's readers are done
  if (tid % 32 == 0) warps[tid / 32] = state;
  __syncthreads();
  if (tid < 32) state = warp_join(tid < THREADS / 32 ? warps[tid] : empty_state());
  return state;
}

struct Outputs {
  float *entropy, *confidence;
  i64* argmax;
#if DECISION
  u8* decision;
  float* load;
  const float *mean_at, *std_at, *threshold_at;
  float mean, std, threshold, progress;
#endif
};

__device__ __forceinline__ void finish(int row, const State& p, const Outputs& out, float norm2, float moved2) {
  float entropy = log2f(p.s) - p.t / p.s;  // NaN for a row with NaN, +inf, or nothing but -inf: as softmax has it
  if (entropy < 0.0f) entropy = 0.0f;
  out.entropy[row] = entropy;
#if DECISION
  const float mean = number(out.mean_at, out.mean), std = fmaxf(number(out.std_at, out.std), 1e-6f);
  const float confidence = 1.0f / (1.0f + expf(-2.0f * (mean - entropy) / std));
  const float stability = 1.0f / (1.0f + sqrtf(moved2) / fmaxf(sqrtf(norm2), 1e-12f));
  out.confidence[row] = confidence;
  out.load[row] = 0.5f * (1.0f - confidence) + 0.3f * (1.0f - stability) + 0.2f * (1.0f - out.progress);
  out.decision[row] =
      confidence * stability * out.progress > number(out.threshold_at, out.threshold) - 0.2f * out.progress;
#else
  out.confidence[row] = p.s > 0.0f ? 1.0f / p.s : entropy;  // nothing but -inf, or a NaN: NaN
#endif
  if (out.argmax) out.argmax[row] = p.index == NO_INDEX ? 0 : p.index;
}

#if DECISION
// |h|^2 and |h - prev|^2 of one row, by one block.
__device__ __forceinline__ void norms_of(
    const typename Elem<HT>::raw* h, const typename Elem<HT>::raw* prev, int width, float2* out) {
  constexpr int N = Vec<HT>::N;
  const bool aligned = (((u64)h | (u64)prev) & 15) == 0;
  float norm2 = 0.0f, moved2 = 0.0f;
  for (int k = threadIdx.x * N; k < width; k += THREADS * N) {
    float a[N], b[N];
    unpack<HT>(load_vec<HT>(h + k, width - k, aligned), a);
    unpack<HT>(load_vec<HT>(prev + k, width - k, aligned), b);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      norm2 = fmaf(a[j], a[j], norm2);
      moved2 = fmaf(a[j] - b[j], a[j] - b[j], moved2);
    }
  }
  __shared__ float2 warps[THREADS / 32];
  norm2 = warp_sum(norm2);
  moved2 = warp_sum(moved2);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = make_float2(norm2, moved2);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < THREADS / 32; ++w) {
      norm2 += warps[w].x;
      moved2 += warps[w].y;
    }
    *out = make_float2(norm2, moved2);
  }
}
#endif

// The last part of a row has arrived: join what the others left. Partial (block b, row r) lies at b + r, which no other pair
// shares, because spans and rows both advance along the same flat order.
__device__ __forceinline__ void join_row(
    int row, int first, int blocks, const float4* partial, const float2* norms, const Outputs& out) {
  if (threadIdx.x >= 32) return;
  State p = empty_state();
  for (int b = threadIdx.x; b < blocks; b += 32) {
    const float4 q = __ldcg(partial + first + b + row);
    State o;
    o.m = q.x;
    o.s = q.y;
    o.t = q.z;
    o.index = __float_as_int(q.w);
    p = join(p, o);
  }
  p = warp_join(p);
  if (threadIdx.x == 0) {
    const float2 n = DECISION ? __ldcg(norms + row) : make_float2(0.0f, 0.0f);
    finish(row, p, out, n.x, n.y);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) entropy(
    const typename Elem<T>::raw* logits, i64 outer, i64 inner, int per_outer, int rows, int vocab, i64 span,
    float4* partial, u32* counter, float* entropy_out, float* confidence_out, i64* argmax_out
#if DECISION
    , float2* norms, const typename Elem<HT>::raw* hidden, i64 h_outer, i64 h_inner, int h_per_outer,
    const typename Elem<HT>::raw* prev, i64 p_outer, i64 p_inner, int p_per_outer, int width,
    const float* mean_at, float mean, const float* std_at, float std, const float* threshold_at, float threshold,
    float progress, u8* decision_out, float* load_out
#endif
) {
  Outputs out;
  out.entropy = entropy_out;
  out.confidence = confidence_out;
  out.argmax = argmax_out;
  i64 block = blockIdx.x;
#if DECISION
  out.decision = decision_out;
  out.load = load_out;
  out.mean_at = mean_at;
  out.mean = mean;
  out.std_at = std_at;
  out.std = std;
  out.threshold_at = threshold_at;
  out.threshold = threshold;
  out.progress = progress;
  if (block < rows) {
    const int row = (int)block;
    const Rows hr = {h_outer, h_inner, h_per_outer}, pr = {p_outer, p_inner, p_per_outer};
    norms_of(hidden + hr.offset(row), prev + pr.offset(row), width, norms + row);
    const int first = (int)((i64)row * vocab / span), last = (int)(((i64)(row + 1) * vocab - 1) / span);
    if (arrive_last(counter + row, last - first + 2)) join_row(row, first, last - first + 1, partial, norms, out);
    return;
  }
  block -= rows;
#else
  const float2* norms = nullptr;
#endif
  const Rows lr = {outer, inner, per_outer};
  const i64 total = (i64)rows * vocab, end = min((block + 1) * span, total);
  for (i64 at = block * span; at < end;) {
    const int row = (int)(at / vocab), from = (int)(at - (i64)row * vocab);
    const int count = (int)min((i64)(vocab - from), end - at);
    const State state = scan(logits + lr.offset(row) + from, count, from);
    const int first = (int)((i64)row * vocab / span), last = (int)(((i64)(row + 1) * vocab - 1) / span);
    const int parts = last - first + 1 + DECISION;
    if (parts == 1) {
      if (threadIdx.x == 0) finish(row, state, out, 0.0f, 0.0f);
    } else {
      if (threadIdx.x == 0)
        partial[block + row] = make_float4(state.m, state.s, state.t, __int_as_float(state.index));
      if (arrive_last(counter + row, parts)) join_row(row, first, last - first + 1, partial, norms, out);
    }
    at += count;
  }
}
