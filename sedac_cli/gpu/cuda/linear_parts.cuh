// What both linear kernels (skinny.cu, batch.cu) are made of. Constants: T, ACT (0 none, 1 silu, 2 gelu tanh, 3 gelu).

#define PENDING (-1)

typedef Elem<T>::raw raw;

// 16 bytes on their way into shared memory; the 256-byte hint lets the cache fetch the row ahead.
__device__ __forceinline__ void stream16(u32 to, const raw* p, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(p), "r"(bytes) : "memory");
}

__device__ __forceinline__ float activate(float x) {
#if ACT == 1
  return x / (1.0f + __expf(-x));
#elif ACT == 2
  return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
#elif ACT == 3
  return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#else
  return x;
#endif
}

__device__ __forceinline__ void wait_for(const int* counter, int value) {
  int now;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  while (now < value);
}

