// out = act(gate) * up for the first *count rows; rows behind them are neither read nor written. One block per row and slice.
// Constants: T, ACT (1 silu, 2 gelu tanh, 3 gelu).
#define THREADS 256

typedef Elem<T>::raw raw;

__device__ __forceinline__ float rounded(float x) { return widen<T>(narrow<T>(x)); }

__device__ __forceinline__ float act(float x) {
#if ACT == 1
  return x / (1.0f + __expf(-x));
#elif ACT == 2
  return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
#else
  return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) activate(
    const raw* gate, const raw* up, i64 stride, raw* out, int width, const int* count) {
  constexpr int N = Vec<T>::N;
  const int row = blockIdx.x;
  if (row >= *count) return;
  gate += row * stride, up += row * stride, out += (i64)row * width;
  for (int i = (blockIdx.y * THREADS + threadIdx.x) * N; i < width; i += gridDim.y * THREADS * N) {
    float g[N], u[N];
    unpack<T>(__ldcs((const uint4*)(gate + i)), g);
    unpack<T>(__ldcs((const uint4*)(up + i)), u);
    __align__(16) raw y[N];
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = narrow<T>(rounded(act(g[j])) * u[j]);
    *(uint4*)(out + i) = *(const uint4*)y;
  }
}
