// RMSNorm of rows, with RESIDUAL of x + residual, which is written beside it. Constants: T, RESIDUAL.

typedef Elem<T>::raw raw;

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
