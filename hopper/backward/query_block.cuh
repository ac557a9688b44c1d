// The block of queries that a block of the grid has, in the kernels before and after the main one.
#pragma once

#include "backward/params.h"

namespace hopper_attention {

struct QueryBlock {
  int head;
  int batch;
  int row;           // its first
  int rows;          // 0: none
  int used;          // of these, those that ask: its first ones
  std::int64_t lse;  // the index of its first row's
};

// The sequence that has a query block of the workspace; by whole warps, each lane looking at every
// 32nd of those that are left.
__device__ inline int sequence_of(const PackedLengths& lengths, int tile_m, int block) {
  const int lane = threadIdx.x % 32;
  int first = 0, count = lengths.batch + 1;  // it is one of these
  while (count > 1) {
    const int step = (count + 31) / 32;
    const int index = first + lane * step;
    bool here = lane * step < count;
    if (here) {
      const int q_begin = clamp_length(lengths.cu_seqlens_q[index], 0, lengths.total_q);
      here = first_query_block(q_begin, index, tile_m) <= block;
    }
    const int passed = max(__popc(__ballot_sync(0xffffffff, here)) - 1, 0);
    first += passed * step;
    count = min(step, count - passed * step);
  }
  return first;
}

template <bool kPacked>
__device__ QueryBlock query_block(const QueryGrid& grid, int index) {
  const int m_block = index % grid.num_m_blocks;
  const int pair = index / grid.num_m_blocks;  // batch * heads + head
  if constexpr (kPacked) {
    const int i = sequence_of(grid.lengths, grid.tile_m, m_block);
    const Sequence sequence = sequence_at(grid.lengths, i);
    const int first = (m_block - first_query_block(sequence.q_begin, i, grid.tile_m)) * grid.tile_m;
    if (first < 0 || first >= sequence.rows) return {pair, 0, 0, 0, 0, 0};
    const int row = sequence.q_begin + first, rows = min(grid.tile_m, sequence.rows - first);
    const int used = clamp_length(sequence.seqlen_q - first, 0, rows);
    return {pair, 0, row, rows, used, static_cast<std::int64_t>(pair) * grid.seqlen_q + row};
  } else {
    const int row = m_block * grid.tile_m, rows = min(grid.tile_m, grid.seqlen_q - row);
    return {pair % grid.heads,
            pair / grid.heads,
            row,
            rows,
            rows,
            static_cast<std::int64_t>(pair) * grid.seqlen_q + row};
  }
}

}  // namespace hopper_attention
