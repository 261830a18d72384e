// Entropy in bits, largest probability and argmax of each row of logits, in one read of the logits.
//
// H = log2 S - T / S with S = sum 2^d, T = sum 2^d d, d = (v - max) log2 e, kept online: one exponential per logit.
// A row is cut into `parts` chunks; chunk and row make an item, taken whole by a group of GROUP warps. No item crosses rows: a
// block that did would read, reduce and arrive twice in a row, 3 us of an idle memory bus (seen at every row count).
// GROUP = 8: one item per block, for few rows. GROUP = 1: warps stay and take items from a queue, and never wait for each
// other, so one warp's reduction hides behind the others' loads; slow and quick multiprocessors end together.
// The group that brings a row's last part joins them. DECISION: each part also sums its share of |h|^2 and |h - prev|^2.
// Constants: T (logits), HT (hidden), DECISION, GROUP, UNROLL (loads in flight per thread), BLOCKS per multiprocessor.

#define THREADS 256
#define LANES (32 * GROUP)
#define LOG2E 1.4426950408889634f
#define LOWEST (-3.4028234663852886e38f)
#define NEG_INF (-__int_as_float(0x7f800000))
#define FLOOR (-200.0f)  // 2^-200 is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN
#define NO_INDEX 0x7fffffff

struct State {
  float m, s, t;  // maximum, S, T
  int index;      // of the first maximum
#if DECISION
  float norm, moved;  // |h|^2, |h - prev|^2
#endif
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
#if DECISION
  r.norm = a.norm + b.norm;
  r.moved = a.moved + b.moved;
#endif
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

// The maximum first, then one exponential per lane and plain sums.
__device__ __forceinline__ State warp_join(State p) {
  float top = p.m;
#pragma unroll
  for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  if (p.m != top) p.index = NO_INDEX;
  lift(p, fmaxf(top, LOWEST));
  p.m = top;
  p.s = warp_sum(p.s);
  p.t = warp_sum(p.t);
#pragma unroll
  for (int d = 16; d; d >>= 1) p.index = min(p.index, __shfl_xor_sync(0xffffffffu, p.index, d));
#if DECISION
  p.norm = warp_sum(p.norm);
  p.moved = warp_sum(p.moved);
#endif
  return p;
}

__device__ __forceinline__ State empty_state() {
  State p;
  p.m = NEG_INF;
  p.s = p.t = 0.0f;
  p.index = NO_INDEX;
#if DECISION
  p.norm = p.moved = 0.0f;
#endif
  return p;
}

// A lane's share of `count` logits from `p`. `base` is the index of p[0] in its row.
__device__ __forceinline__ State scan(const typename Elem<T>::raw* p, int count, int base, int lane) {
  constexpr int N = Vec<T>::N, SIZE = 16 / N;
  State state = empty_state();
  const int head = min((int)(((16 - ((u64)p & 15)) & 15) / SIZE), count);
  const int vectors = (count - head) / N, tail = count - head - vectors * N;
  if (lane < head) {
    const float v[1] = {widen<T>(p[lane])};
    push(state, v, base + lane);
  }
  const uint4* body = (const uint4*)(p + head);
  for (int i = lane; i < vectors; i += UNROLL * LANES) {
    uint4 q[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * LANES < vectors) q[u] = __ldcs(body + i + u * LANES);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (i + u * LANES < vectors) {
        float v[N];
        unpack<T>(q[u], v);
        push(state, v, base + head + (i + u * LANES) * N);
      }
    }
  }
  if (lane < tail) {
    const int k = head + vectors * N + lane;
    const float v[1] = {widen<T>(p[k])};
    push(state, v, base + k);
  }
  return state;
}

// The state of a group, in every lane of its first warp.
__device__ __forceinline__ State group_join(State state) {
  state = warp_join(state);
#if GROUP > 1
  __shared__ State warps[GROUP];
  const int tid = threadIdx.x;
  __syncthreads();  // the previous item's readers are done
  if (tid % 32 == 0) warps[tid / 32] = state;
  __syncthreads();
  if (tid < 32) state = warp_join(tid < GROUP ? warps[tid] : empty_state());
#endif
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

__device__ __forceinline__ void finish(int row, const State& p, const Outputs& out) {
  float entropy = log2f(p.s) - p.t / p.s;  // NaN for a row with NaN, +inf, or nothing but -inf: as softmax has it
  if (entropy < 0.0f) entropy = 0.0f;
  out.entropy[row] = entropy;
#if DECISION
  const float mean = number(out.mean_at, out.mean), std = fmaxf(number(out.std_at, out.std), 1e-6f);
  const float confidence = 1.0f / (1.0f + expf(-2.0f * (mean - entropy) / std));
  const float stability = 1.0f / (1.0f + sqrtf(p.moved) / fmaxf(sqrtf(p.norm), 1e-12f));
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
// A part's share of |h|^2 and |h - prev|^2. The first vector is asked for before the logits and used after them.
struct Norms {
  const typename Elem<HT>::raw *h, *prev;
  int k, end;
  bool aligned;
  uint4 a, b;

  __device__ __forceinline__ Norms(
      const typename Elem<HT>::raw* h_row, const typename Elem<HT>::raw* prev_row, int width, int part, int parts, int lane)
      : h(h_row), prev(prev_row) {
    const int share = ((width + 8 * parts - 1) / (8 * parts)) * 8;
    k = part * share + lane * Vec<HT>::N;
    end = min((part + 1) * share, width);
    aligned = (((u64)h | (u64)prev) & 15) == 0;
    load();
  }
  __device__ __forceinline__ void load() {
    a = load_vec<HT>(h + k, end - k, aligned);
    b = load_vec<HT>(prev + k, end - k, aligned);
  }
  __device__ __forceinline__ void add_to(State& p) {
    while (true) {
      float x[Vec<HT>::N], y[Vec<HT>::N];
      unpack<HT>(a, x);
      unpack<HT>(b, y);
#pragma unroll
      for (int j = 0; j < Vec<HT>::N; ++j) {
        p.norm = fmaf(x[j], x[j], p.norm);
        p.moved = fmaf(x[j] - y[j], x[j] - y[j], p.moved);
      }
      k += LANES * Vec<HT>::N;
      if (k >= end) return;
      load();
    }
  }
};
#endif

// By one warp: what the parts of a row left, put together.
__device__ __forceinline__ void join_row(int row, int parts, const float4* partial, const float2* norms, const Outputs& out) {
  State p = empty_state();
  const int lane = threadIdx.x % 32;
  for (int b = lane; b < parts; b += 32) {
    const float4 q = __ldcg(partial + row * parts + b);
    State o = empty_state();
    o.m = q.x;
    o.s = q.y;
    o.t = q.z;
    o.index = __float_as_int(q.w);
#if DECISION
    const float2 n = __ldcg(norms + row * parts + b);
    o.norm = n.x;
    o.moved = n.y;
#endif
    p = join(p, o);
  }
  p = warp_join(p);
  if (lane == 0) finish(row, p, out);
}

// `queue` starts and ends at 0; without one, items are dealt in turn.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) entropy(
    const typename Elem<T>::raw* logits, i64 outer, i64 inner, int per_outer, int rows, int vocab, int parts, int chunk,
    float4* partial, u32* counter, int queue_at, float* entropy_out, float* confidence_out, i64* argmax_out
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
  const Rows hr = {h_outer, h_inner, h_per_outer}, pr = {p_outer, p_inner, p_per_outer};
#else
  const float2* norms = nullptr;
#endif
  const Rows lr = {outer, inner, per_outer};
  const int lane = threadIdx.x % LANES;
  const u32 items = (u32)rows * parts, groups = gridDim.x * (THREADS / LANES);
  for (u32 item = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES; item < items;) {
    u32 next = item + groups;
    // Asked for now, needed after the scan. Every group that has an item asks once more than it gets: `items` times in all.
    if (GROUP == 1 && queue_at >= 0 && lane == 0) next = min(groups, items) + atomicInc(counter + queue_at, items - 1);
    const int row = (int)(item / (u32)parts), part = (int)(item - (u32)row * parts), from = part * chunk;
#if DECISION
    Norms mine(hidden + hr.offset(row), prev + pr.offset(row), width, part, parts, lane);
#endif
    State state = scan(logits + lr.offset(row) + from, min(chunk, vocab - from), from, lane);
#if DECISION
    mine.add_to(state);
#endif
    state = group_join(state);
    if (lane < 32) {
      if (parts == 1) {
        if (lane == 0) finish(row, state, out);
      } else {
        bool last = false;
        if (lane == 0) {
          partial[item] = make_float4(state.m, state.s, state.t, __int_as_float(state.index));
#if DECISION
          norms[item] = make_float2(state.norm, state.moved);
#endif
          __threadfence();
          last = atomicInc(counter + row, parts - 1) == parts - 1;
          __threadfence();
        }
        if (__ballot_sync(0xffffffffu, last)) join_row(row, parts, partial, norms, out);
      }
    }
    item = GROUP == 1 ? __shfl_sync(0xffffffffu, next, 0) : next;
  }
}
