// What is known of some logits of a row: maximum, S and T as entropy.cu has them, and the first index of the maximum.

#define LOG2E 1.4426950408889634f
#define LOWEST (-3.4028234663852886e38f)
#define ORDINARY 65536.0f  // from here on rounding m log2e would shift an exponent by more than 1/128
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

// What exponents count from, in log2, for a maximum m. Rounded as it is: sums to any base near the maximum give the same entropy,
// and v log2e - base is one rounded operation. The rounded base of a maximum that is not ordinary may lie far from it: there
// exponents count from the maximum itself, and differences are taken first.
__device__ __forceinline__ bool ordinary(float m) { return fabsf(m) <= ORDINARY; }
__device__ __forceinline__ float base_of(float m) { return __fmul_rn(m, LOG2E); }  // never fused: it must be one number everywhere

__device__ __forceinline__ void lift(State& p, float m) {
  const bool rounds = ordinary(p.m), will = ordinary(m);
  const float apart = fmaf((rounds ? 0.0f : p.m) - (will ? 0.0f : m), LOG2E, (rounds ? base_of(p.m) : 0.0f) - (will ? base_of(m) : 0.0f));
  const float d = fmaxf(apart, FLOOR), a = exp2_fast(d);
  p.t = a * fmaf(p.s, d, p.t);
  p.s *= a;
}

// 2^(maximum - base): 1, but for the base's rounding.
__device__ __forceinline__ float at_top(const State& p) { return ordinary(p.m) ? exp2_fast(fmaf(p.m, LOG2E, -base_of(p.m))) : 1.0f; }

__device__ __forceinline__ float warp_top(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

__device__ __forceinline__ int warp_first(int index) {
#pragma unroll
  for (int d = 16; d; d >>= 1) index = min(index, __shfl_xor_sync(0xffffffffu, index, d));
  return index;
}

// What a warp's lanes have summed towards one maximum.
__device__ __forceinline__ State warp_total(State p) {
  p.s = warp_sum(p.s);
  p.t = warp_sum(p.t);
#if CARRY
  p.norm = warp_sum(p.norm);
  p.moved = warp_sum(p.moved);
#endif
  return p;
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

// A warp's next logits, the same number in every lane; `index(j)` of the j-th grows with j. The maximum and its index are the warp's: in
// lanes of their own, some lane of 32 would find a new one in 38 % of 198 steps (expected of random logits: the mean of
// 1 - (1 - 1/i)^32), and all would wait for it.
template <int N, class Index>
__device__ __forceinline__ void push(State& p, float (&v)[N], Index index) {
  float top = v[0];
#pragma unroll
  for (int j = 1; j < N; ++j) top = fmaxf(top, v[j]);
  if (__any_sync(0xffffffffu, top > p.m)) {
    top = warp_top(top);
    lift(p, top);
    p.m = top;
    int first = NO_INDEX;
#pragma unroll
    for (int j = N - 1; j >= 0; --j)
      if (v[j] == top) first = index(j);
    p.index = warp_first(first);
  }
  float base = base_of(p.m);
  if (!ordinary(p.m)) {
    base = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] -= fmaxf(p.m, LOWEST);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float d = max_or_nan(fmaf(v[j], LOG2E, -base), FLOOR), e = exp2_fast(d);
    p.s += e;
    p.t = fmaf(e, d, p.t);
  }
}

// Of states that were not a warp's: the maximum first, then one exponential per lane and plain sums.
__device__ __forceinline__ State warp_join(State p) {
  const float top = warp_top(p.m);
  if (p.m != top) p.index = NO_INDEX;
  lift(p, fmaxf(top, LOWEST));
  p.m = top;
  p.index = warp_first(p.index);
  return warp_total(p);
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
