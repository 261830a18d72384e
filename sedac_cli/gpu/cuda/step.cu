// What begins a decode step and what ends it. Constants: T, the kind of the embedding and of the rotary tables; step_end has none.
#define THREADS 256
// Vectors, or end tokens, that a thread has asked for before it looks at the first.
#define HELD 4

#ifdef T
typedef Elem<T>::raw raw;

__device__ __forceinline__ i64 within(i64 index, i64 count) { return index < 0 ? 0 : index < count ? index : count - 1; }

__device__ __forceinline__ void copy_row(const raw* from, raw* to, int width) {
  constexpr int N = Vec<T>::N, STRIDE = THREADS * N;
  const bool aligned = (((u64)from | (u64)to) & 15) == 0;
  for (int begin = threadIdx.x * N; begin < width; begin += HELD * STRIDE) {
    uint4 v[HELD];
#pragma unroll
    for (int h = 0, i = begin; h < HELD; ++h, i += STRIDE)
      if (i < width) v[h] = load_vec<T>(from + i, width - i, aligned);
#pragma unroll
    for (int h = 0, i = begin; h < HELD; ++h, i += STRIDE)
      if (i < width) store_vec<T>(to + i, v[h], width - i, aligned);
  }
}

// Three blocks a row: its embedding, its cosines, its sines; what has no source is left out. An index out of bounds reads the row
// that is nearest.
extern "C" __global__ void __launch_bounds__(THREADS) step_begin(
    const i64* tokens, const i64* position, const u8* finished, const raw* weight, i64 weight_stride, i64 vocabulary, int width,
    raw* h, const raw* cosines, const raw* sines, i64 places, int rotary, raw* cos_out, raw* sin_out, u8* real) {
  const i64 row = blockIdx.x;
  settle();
  release();
  if (blockIdx.y == 0) {
    const u8 ended = finished[row];
    if (weight) copy_row(weight + within(tokens[row], vocabulary) * weight_stride, h + row * width, width);
    if (threadIdx.x == 0) real[row] = !ended;
  } else if (cosines) {
    const bool first = blockIdx.y == 1;
    const i64 at = within(position[row], places) * rotary;
    copy_row((first ? cosines : sines) + at, (first ? cos_out : sin_out) + row * rotary, rotary);
  }
}
#endif

// The first block has a thread a row, the second what rows share. `above`, which may be missing: the token's logit less the best's,
// whose probability is `confidence`.
extern "C" __global__ void __launch_bounds__(THREADS) step_end(
    const i64* token, const float* entropy, const float* confidence, const float* above, int rows, const i64* ends, int count,
    i64 pad, i64* tokens, i64* position, u8* finished, i64* slot, const int* needs, int layers, i64* tokens_out,
    float* entropy_out, float* logprob_out, u8* finished_out, int* needs_out) {
  settle();
  release();
  if (blockIdx.x == 1) {
    for (int layer = threadIdx.x; layer < layers; layer += THREADS) needs_out[layer] = needs[layer];
    if (threadIdx.x == 0) *slot += 1;
    return;
  }
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    i64 end[HELD];
#pragma unroll
    for (int k = 0; k < HELD; ++k) end[k] = k < count ? ends[k] : 0;
    const i64 chosen = token[row], place = position[row];
    const float bits = entropy[row], top = confidence[row], less = above ? above[row] : 0.0f;
    const bool ended = finished[row];
    const i64 next = ended ? pad : chosen;
    bool over = ended;
#pragma unroll
    for (int k = 0; k < HELD; ++k) over |= k < count && next == end[k];
    for (int k = HELD; k < count; ++k) over |= next == ends[k];
    tokens[row] = tokens_out[row] = next;
    finished[row] = finished_out[row] = over;
    position[row] = place + 1;
    entropy_out[row] = bits;
    logprob_out[row] = __fadd_rn(less, logf(top));
  }
}
