// Entropy in bits, largest probability and argmax of each row of logits, in one read of the logits.
//
// H = log2 S - T / S with S = sum 2^d, T = sum 2^d d, d = (v - max) log2 e, kept online: one exponential per logit. The maximum so far
// is a warp's, so finding a new one is rare, and never one lane's business while 31 wait.
// A row is cut into `parts` chunks; chunk and row make an item, taken whole by a group of GROUP warps. No item crosses rows: a
// block that did would read, reduce and arrive twice in a row, 3 us of an idle memory bus (seen at every row count).
// GROUP = 8: one item per block, for few rows. GROUP = 1: warps stay and take items from a queue, and never wait for each
// other, so one warp's reduction hides behind the others' loads; slow and quick multiprocessors end together. Their loads go
// through shared memory, STAGES - 1 rounds of UNROLL ahead and into the warp's next item, so a warp has loads under way while it
// computes, reduces and arrives, and the last warps of a launch still fill the memory bus.
// The group that brings a row's last part joins them. DECISION: the stability of a row is one more part, read by a block of
// its own (GROUP = 8), or each part also sums its share of |h|^2 and |h - prev|^2 (GROUP = 1).
// Constants: T (logits), HT (hidden), DECISION, GROUP, UNROLL (loads in flight per thread), BLOCKS per multiprocessor,
// STAGES (GROUP = 1).

#define THREADS 256
#define LANES (32 * GROUP)
#define ROUND (UNROLL * LANES)      // vectors a group reads at once
#define ROUND_BYTES (UNROLL * 512)  // of one warp
#define AT_ONCE 2                   // vectors that a lane of a larger group works on together

// A chunk of a row: `head` logits up to the first 16-byte boundary, `vectors` of 16 bytes, and a tail.
struct Item {
  const typename Elem<T>::raw* p;
  int row, part, from, count, head, vectors;
  __device__ __forceinline__ const uint4* body() const { return (const uint4*)(p + head); }
};

__device__ __forceinline__ Item item_at(
    u32 item, u32 items, const typename Elem<T>::raw* logits, const Rows& at, int vocab, int parts, int chunk) {
  constexpr int N = Vec<T>::N, SIZE = 16 / N;
  Item r;
  if (item >= items) {
    r.p = logits;
    r.row = r.part = r.from = r.count = r.head = r.vectors = 0;
    return r;
  }
  r.row = parts == 1 ? (int)item : (int)(item / (u32)parts);
  r.part = (int)(item - (u32)r.row * parts);
  r.from = r.part * chunk;
  r.p = logits + at.offset(r.row) + r.from;
  r.count = min(chunk, vocab - r.from);
  r.head = min((int)(((16 - ((u64)r.p & 15)) & 15) / SIZE), r.count);
  r.vectors = (r.count - r.head) / N;
  return r;
}

// What lies before and after the vectors, a logit a lane. What is not there counts as -inf, which changes nothing.
__device__ __forceinline__ void push_ends(State& state, const Item& item, int at, int end, int warp_begin) {
  if (warp_begin >= end) return;
  float v[1] = {at < end ? widen<T>(item.p[at]) : NEG_INF};
  push(state, v, [&](int) { return item.from + at; });
}
__device__ __forceinline__ void push_head(State& state, const Item& item, int lane) {
  push_ends(state, item, lane, item.head, lane & ~31);
}
__device__ __forceinline__ void push_tail(State& state, const Item& item, int lane) {
  const int begin = item.head + item.vectors * Vec<T>::N;
  push_ends(state, item, begin + lane, item.count, begin + (lane & ~31));
}

// COUNT vectors a lane, `stride` apart, from the i-th of the item on; `get(c)` brings one. All lanes of a warp come here together.
template <int COUNT, class Get>
__device__ __forceinline__ void push_vectors(State& state, const Item& item, int i, int stride, Get get) {
  constexpr int N = Vec<T>::N;
  float v[COUNT * N];
  const bool whole = (i | 31) + (COUNT - 1) * stride < item.vectors;  // as the warp sees it: `i` begins at a multiple of 32
#pragma unroll
  for (int c = 0; c < COUNT; ++c) {
    float of[N];
    const bool there = whole || i + c * stride < item.vectors;
    uint4 q = make_uint4(0, 0, 0, 0);
    if (there) q = get(c);
    unpack<T>(q, of);
#pragma unroll
    for (int j = 0; j < N; ++j) v[c * N + j] = of[j];
  }
  if (!whole)
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (i + c * stride >= item.vectors) v[c * N + j] = NEG_INF;
  push(state, v, [&](int j) { return item.from + item.head + (i + j / N * stride) * N + j % N; });
}

#if GROUP > 1
// A lane's share of an item, UNROLL loads at a time in registers.
__device__ __forceinline__ State scan(const Item& item, int lane) {
  static_assert(UNROLL % AT_ONCE == 0, "loads are worked on AT_ONCE at a time");
  State state = empty_state();
  push_head(state, item, lane);
  const uint4* body = item.body();
  for (int first = lane & ~31; first < item.vectors; first += ROUND) {
    const int i = first + lane % 32;
    uint4 q[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * LANES < item.vectors) q[u] = __ldcs(body + i + u * LANES);
#pragma unroll
    for (int u = 0; u < UNROLL; u += AT_ONCE) push_vectors<AT_ONCE>(state, item, i + u * LANES, LANES, [&](int c) { return q[u + c]; });
  }
  push_tail(state, item, lane);
  return state;
}

// The state of a group, in every lane of its first warp.
__device__ __forceinline__ State group_join(State state) {
  __shared__ State warps[GROUP];
  const int tid = threadIdx.x;
  state = warp_total(state);
  if (tid % 32 == 0) warps[tid / 32] = state;
  __syncthreads();
  if (tid < 32) state = warp_join(tid < GROUP ? warps[tid] : empty_state());
  return state;
}
#else
// A warp's ring in shared memory. Every lane reads only what it asked for itself, so nobody waits for anybody: no barriers.
struct Ring {
  u32 base;        // of this lane
  u32 read, fill;  // offsets of the round to be read next, and of the one to be asked for next
  __device__ __forceinline__ static u32 after(u32 at) { return at == (STAGES - 1) * ROUND_BYTES ? 0u : at + ROUND_BYTES; }

  // Vectors i, i + 32, ... of an item. Past its end nothing is read, but the round counts.
  __device__ __forceinline__ void ask(const uint4* body, int i, int vectors) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * 32 < vectors) copy_async16(base + fill + u * 512, body + i + u * 32, 16);
    copy_async_commit();
    fill = after(fill);
  }
};

__device__ __forceinline__ uint4 shared_vector(u32 address) {
  uint4 q;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(address) : "memory");
  return q;
}
#endif

struct Outputs {
  float *entropy, *confidence;
  i64* argmax;
#if DECISION
  u8* decision;
  float* load;
  float mean, std, threshold, progress;
#endif
};

__device__ __forceinline__ void finish(int row, const State& p, float stability, const Outputs& out) {
  float entropy = log2f(p.s) - p.t / p.s;  // NaN for a row with NaN, +inf, or nothing but -inf: as softmax has it
  if (entropy < 0.0f) entropy = 0.0f;
  out.entropy[row] = entropy;
#if DECISION
  const float confidence = __fdividef(1.0f, 1.0f + __expf(-2.0f * __fdividef(out.mean - entropy, out.std)));
  out.confidence[row] = confidence;
  out.load[row] = 0.5f * (1.0f - confidence) + 0.3f * (1.0f - stability) + 0.2f * (1.0f - out.progress);
  out.decision[row] = confidence * stability * out.progress > out.threshold - 0.2f * out.progress;
#else
  out.confidence[row] = p.s > 0.0f ? at_top(p) / p.s : entropy;  // nothing but -inf, or a NaN: NaN
#endif
  if (out.argmax) out.argmax[row] = p.index == NO_INDEX ? 0 : p.index;
}

#if DECISION
#if CARRY
#define WIDE 32
#else
#define WIDE THREADS
#endif
// A thread's share of |h|^2 and |h - prev|^2 over columns [from, end): two pairs of loads at a time.
__device__ __forceinline__ void sum_norms(
    const typename Elem<HT>::raw* h, const typename Elem<HT>::raw* prev, int from, int end, int lane, float& norm, float& moved) {
  constexpr int N = Vec<HT>::N;
  const bool aligned = (((u64)h | (u64)prev) & 15) == 0;
  for (int k = from + lane * N; k < end; k += 2 * WIDE * N) {
    uint4 a[2], b[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int at = k + u * WIDE * N;
      a[u] = load_vec<HT, true>(h + at, end - at, aligned);
      b[u] = load_vec<HT, true>(prev + at, end - at, aligned);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float x[N], y[N];
      unpack<HT>(a[u], x);
      unpack<HT>(b[u], y);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        norm = fmaf(x[j], x[j], norm);
        moved = fmaf(x[j] - y[j], x[j] - y[j], moved);
      }
    }
  }
}

__device__ __forceinline__ float stability_of(float norm, float moved) {
  return 1.0f / (1.0f + sqrtf(moved) / fmaxf(sqrtf(norm), 1e-12f));
}
#endif

// By one warp: what the parts of a row left, put together.
__device__ __forceinline__ void join_row(int row, int parts, const float4* partial, const float2* norms, const Outputs& out) {
  State p = empty_state();
  const int lane = threadIdx.x % 32;
  float stability = 0.0f;
#if DECISION && !CARRY
  stability = __ldcg(norms + row).x;
#endif
  for (int b = lane; b < parts; b += 32) {
    const float4 q = __ldcg(partial + row * parts + b);
    State o = empty_state();
    o.m = q.x;
    o.s = q.y;
    o.t = q.z;
    o.index = __float_as_int(q.w);
#if CARRY
    const float2 n = __ldcg(norms + row * parts + b);
    o.norm = n.x;
    o.moved = n.y;
#endif
    p = join(p, o);
  }
  p = warp_join(p);
#if CARRY
  stability = stability_of(p.norm, p.moved);
#endif
  if (lane == 0) finish(row, p, stability, out);
}

// Called by one thread after its writes. True for the last of `expected`, who may then read what the others wrote.
__device__ __forceinline__ bool arrive(u32* counter, int expected) {
  __threadfence();
  const bool last = atomicInc(counter, expected - 1) == expected - 1;
  __threadfence();
  return last;
}

__device__ __forceinline__ void write_state(float4* partial, u32 item, const State& state) {
  partial[item] = make_float4(state.m, state.s, state.t, __int_as_float(state.index));
}

#if DECISION && !CARRY
// By one block: the stability of a row, while others read its logits. True in the thread that finds everything arrived.
__device__ __forceinline__ bool settle_row(
    int row, const typename Elem<HT>::raw* h, const typename Elem<HT>::raw* prev, int width, float2* norms, u32* counter,
    int expected) {
  __shared__ float2 sums[THREADS / 32];
  float norm = 0.0f, moved = 0.0f;
  sum_norms(h, prev, 0, width, threadIdx.x, norm, moved);
  norm = warp_sum(norm);
  moved = warp_sum(moved);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = make_float2(norm, moved);
  __syncthreads();
  if (threadIdx.x > 0) return false;
  norm = moved = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) {
    norm += sums[w].x;
    moved += sums[w].y;
  }
  norms[row] = make_float2(stability_of(norm, moved), 0.0f);
  return arrive(counter, expected);
}
#endif

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
  settle();
  release();
  Outputs out;
  out.entropy = entropy_out;
  out.confidence = confidence_out;
  out.argmax = argmax_out;
#if DECISION
  out.decision = decision_out;
  out.load = load_out;
  out.mean = number(mean_at, mean);
  out.std = fmaxf(number(std_at, std), 1e-6f);
  out.threshold = number(threshold_at, threshold);
  out.progress = progress;
  const Rows hr = {h_outer, h_inner, h_per_outer}, pr = {p_outer, p_inner, p_per_outer};
#else
  const float2* norms = nullptr;
#endif
  const Rows lr = {outer, inner, per_outer};
  const int lane = threadIdx.x % LANES;
  const u32 items = (u32)rows * parts;
#if GROUP > 1
  u32 block = blockIdx.x;
  int row, expected = parts;
  bool last = false;
#if DECISION
  // Asked for now: left to the end, each would cost a trip to memory after everything else is there.
  asm volatile("" : "+f"(out.mean), "+f"(out.std), "+f"(out.threshold), "+f"(out.progress));
  expected = parts + 1;
  if (block < (u32)rows) {
    row = (int)block;
    last = settle_row(row, hidden + hr.offset(row), prev + pr.offset(row), width, norms, counter + row, expected);
  } else {
    block -= rows;
#endif
    const Item item = item_at(block, items, logits, lr, vocab, parts, chunk);
    row = item.row;
    const State state = group_join(scan(item, lane));
    if (lane == 0) {
      if (expected == 1) {
        finish(row, state, 0.0f, out);
      } else {
        write_state(partial, block, state);
        last = arrive(counter + row, expected);
      }
    }
#if DECISION
  }
#endif
  if (lane < 32 && __ballot_sync(0xffffffffu, last)) join_row(row, parts, partial, norms, out);
#else
  const u32 groups = gridDim.x * (THREADS / 32);
  u32 id = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (id >= items) return;
  Item item = item_at(id, items, logits, lr, vocab, parts, chunk);
  DYNAMIC_SHARED(shared);
  Ring ring = {shared_address(shared) + threadIdx.x / 32 * (STAGES * ROUND_BYTES) + lane * 16, 0u, 0u};
  // Every item takes as many rounds as a full one, and at least those that are asked for ahead.
  const int turns = max(STAGES - 1, (chunk / Vec<T>::N + ROUND - 1) / ROUND);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) ring.ask(item.body(), lane + s * ROUND, item.vectors);
  while (id < items) {
    u32 next = id + groups;
    // Asked for now, needed later. Every warp that has an item asks once more than it gets: `items` times in all.
    if (queue_at >= 0 && lane == 0) next = min(groups, items) + atomicInc(counter + queue_at, items - 1);
    Item coming = item;
    State state = empty_state();
    push_head(state, item, lane);
    const uint4* from = item.body();
    int i = lane + (STAGES - 1) * ROUND, vectors = item.vectors;
    for (int turn = 0; turn < turns; ++turn) {
      copy_async_wait<STAGES - 2>();
      if (turn == turns - (STAGES - 1)) {  // this item is asked for: on to the next
        next = __shfl_sync(0xffffffffu, next, 0);
        coming = item_at(next, items, logits, lr, vocab, parts, chunk);
        from = coming.body();
        i = lane;
        vectors = coming.vectors;
      }
      ring.ask(from, i, vectors);  // into the place that the last turn read
      i += ROUND;
      push_vectors<UNROLL>(
          state, item, lane + turn * ROUND, 32, [&](int u) { return shared_vector(ring.base + ring.read + u * 512); });
      ring.read = Ring::after(ring.read);
    }
    push_tail(state, item, lane);
#if CARRY
    const int share = ((width + 8 * parts - 1) / (8 * parts)) * 8;
    sum_norms(
        hidden + hr.offset(item.row), prev + pr.offset(item.row), item.part * share, min((item.part + 1) * share, width), lane,
        state.norm, state.moved);
#endif
    state = warp_total(state);
    if (parts == 1) {
#if CARRY
      const float stability = stability_of(state.norm, state.moved);
#else
      const float stability = 0.0f;
#endif
      if (lane == 0) finish(item.row, state, stability, out);
    } else {
      bool last = false;
      if (lane == 0) {
        write_state(partial, id, state);
#if CARRY
        norms[id] = make_float2(state.norm, state.moved);
#endif
        last = arrive(counter + item.row, parts);
      }
      if (__ballot_sync(0xffffffffu, last)) join_row(item.row, parts, partial, norms, out);
    }
    item = coming;
    id = next;
  }
#endif
}
