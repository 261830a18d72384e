// What is known of some logits of a row: maximum, S and T as entropy.cu has them, and the first index of the maximum.

#define LOG2E 1.4426950408889634f
#define LOWEST (-3.4028234663852886e38f)
#define NEG_INF (-__int_as_float(0x7f800000))
#define FLOOR (-200.0f)  // 2^-200 is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN
#define NO_INDEX 0x7fffffff

#define CARRY (DECISION && GROUP == 1)  // states carry their share of the two norms

struct State {
  float m, s, t;  // maximum, S, T
  int index;      // of the first maximum
#if CARRY
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
#if CARRY
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
#if CARRY
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
#if CARRY
  p.norm = p.moved = 0.0f;
#endif
  return p;
}
