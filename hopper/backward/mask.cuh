// Scores before P, and P where a query does not see a key.
#pragma once

#include "backward/load.cuh"
#include "forward/mask.cuh"

namespace hopper_attention {

// The queries of one block that a thread's two keys are seen by, as columns of its part of S^T.
struct SeenColumns {
  int begin[kRowsPerThread];
  int end[kRowsPerThread];
};

// kTailOnly: the only unseen keys are those past the end.
template <bool kTailOnly>
CUTE_DEVICE SeenColumns seen_columns(Mask const& mask, int key, int m_block, int tile_m) {
  const int first_column = m_block * tile_m + threadIdx.x % 4 * 2;
  SeenColumns seen;
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int row_key = key + 8 * r;
    const bool exists = row_key < mask.seqlen_k;
    seen.begin[r] = kTailOnly ? 0 : mask.first_row(row_key) - first_column;
    seen.end[r] = !exists ? 0 : kTailOnly ? tile_m : mask.end_row(row_key) - first_column;
    if (!exists) seen.begin[r] = tile_m;
  }
  return seen;
}

CUTE_DEVICE bool is_seen(SeenColumns const& seen, int i) {
  const int r = fragment_row(i), column = fragment_column(i);
  return column >= seen.begin[r] && column < seen.end[r];
}

}  // namespace hopper_attention
