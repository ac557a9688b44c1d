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

// Sets the scores of keys that a row does not see to -inf. row: the thread's first query row.
// kTailOnly: the only unseen keys are those past the end.
template <bool kTailOnly, class Scores>
CUTE_DEVICE void mask_scores(Scores& s, Mask const& mask, int row, int n_block, int tile_n) {
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
