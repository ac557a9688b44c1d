// Scores before the softmax: soft cap and scale, and the mask of boundary blocks.
#pragma once

#include "forward/params.h"
#include "forward/softmax.cuh"

namespace hopper_attention {

// 1 - 2 / (exp(2x) + 1): within 1e-7 of tanh, where tanh.approx is only within 5e-4.
CUTE_DEVICE float precise_tanh(float x) {
  return 1.0f - __fdividef(2.0f, exp2f(x * 2.885390081777927f) + 1.0f);
}

template <class Scores>
CUTE_DEVICE void transform_scores(Scores& s, ForwardParams const& params) {
  constexpr int kSize = decltype(cute::size(s))::value;
  CUTE_UNROLL
  for (int i = 0; i < kSize; ++i) s(i) *= params.inner_scale;
  if (params.cap == 0.0f) return;
  CUTE_UNROLL
  for (int i = 0; i < kSize; ++i) s(i) = params.cap * precise_tanh(s(i));
}

// A thread has two keys of every 8 of a row. Its keys before `column` of 128, one bit each.
CUTE_DEVICE std::uint32_t keys_before(int column) {
  const int clamped = min(max(column, 0), 128);
  const int count = clamped / 8 * 2 + min(clamped % 8, 2);
  return __funnelshift_lc(0xffffffffu, 0u, count);
}

// As mask_scores, a word of 32 keys at a time instead of a comparison or two for each.
template <bool kTailOnly, class Scores>
CUTE_DEVICE void mask_scores_by_bits(Scores& s, Mask const& mask, int row, int n_block,
                                     int tile_n) {
  constexpr int kColumns = decltype(cute::size(s))::value / kRowsPerThread;  // a thread's
  const int first_column = n_block * tile_n + threadIdx.x % 4 * 2;
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int begin = mask.first_key(row + 8 * r) - first_column;
    const int end = (kTailOnly ? mask.seqlen_k : mask.end_key(row + 8 * r)) - first_column;
    CUTE_UNROLL
    for (int first = 0; first < kColumns; first += 32) {
      std::uint32_t seen = keys_before(end - 4 * first);
      if constexpr (!kTailOnly) seen &= ~keys_before(begin - 4 * first);
      CUTE_UNROLL
      for (int j = first; j < min(first + 32, kColumns); ++j) {
        if (!(seen >> (j - first) & 1)) s(fragment_index(r, j)) = -INFINITY;
      }
    }
  }
}

// Sets the scores of keys that a row does not see to -inf. row: the thread's first query row.
// kTailOnly: the only unseen keys are those past the end.
template <bool kTailOnly, bool kByBits = false, class Scores>
CUTE_DEVICE void mask_scores(Scores& s, Mask const& mask, int row, int n_block, int tile_n) {
  if constexpr (kByBits) return mask_scores_by_bits<kTailOnly>(s, mask, row, n_block, tile_n);
  const int first_column = n_block * tile_n + threadIdx.x % 4 * 2;
  int begin[kRowsPerThread], end[kRowsPerThread];
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    begin[r] = mask.first_key(row + 8 * r) - first_column;
    end[r] = (kTailOnly ? mask.seqlen_k : mask.end_key(row + 8 * r)) - first_column;
  }
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(s))::value; ++i) {
    const int r = fragment_row(i), column = fragment_column(i);
    const bool seen = column < end[r] && (kTailOnly || column >= begin[r]);
    if (!seen) s(i) = -INFINITY;
  }
}

}  // namespace hopper_attention
