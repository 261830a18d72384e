// One launch arms every later IF node of a step: node i runs iff flags[i] != 0; with stride 0, one flag speaks for all.
// table: `count` handles, then (has_opposite) as many handles of nodes that run exactly when these do not.
extern "C" __global__ void set_conditions(const u64* table, const int* flags, int stride, int count, int has_opposite) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const bool run = flags[i * stride] != 0;
    cudaGraphSetConditional(table[i], run ? 1u : 0u);
    if (has_opposite) cudaGraphSetConditional(table[count + i], run ? 0u : 1u);
  }
}
