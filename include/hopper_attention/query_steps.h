// In which order a block of keys goes through the queries that see it, and key blocks through the
// adds to one query block's dQ.
#pragma once

#include <cstdint>

#include "hopper_attention/block_range.h"
#include "hopper_attention/tile_order.h"

namespace hopper_attention {

// Query blocks of all query heads of a KV head's group. Ascending, the heads follow one another;
// descending, the query blocks do from the last on, each with all its heads.
struct QuerySteps {
  BlockRange blocks;
  int heads;
  int num_m_blocks;  // of a head, in the workspace
  bool descending;
  int m_block;
  int heads_left;      // of the group; descending, of this query block
  std::int64_t block;  // of the workspace

  // first_block: of the workspace, the first head's query block 0.
  HOPPER_ATTENTION_HD constexpr QuerySteps(BlockRange blocks, int heads, int num_m_blocks,
                                           bool descending, std::int64_t first_block)
      : blocks(blocks),
        heads(heads),
        num_m_blocks(num_m_blocks),
        descending(descending),
        m_block(descending ? blocks.end - 1 : blocks.begin),
        heads_left(blocks.empty() ? 0 : heads),
        block(first_block + m_block) {}

  HOPPER_ATTENTION_HD constexpr bool done() const { return heads_left == 0; }
  HOPPER_ATTENTION_HD constexpr bool last() const {
    return heads_left == 1 && m_block == (descending ? blocks.begin : blocks.end - 1);
  }
  HOPPER_ATTENTION_HD constexpr int head() const { return heads - heads_left; }  // of the group
  HOPPER_ATTENTION_HD constexpr void advance() {
    if (descending) {
      block += num_m_blocks;
      if (--heads_left > 0) return;
      block -= static_cast<std::int64_t>(heads) * num_m_blocks + 1;
      if (--m_block >= blocks.begin) heads_left = heads;
    } else {
      ++block;
      if (++m_block < blocks.end) return;
      m_block = blocks.begin;
      block += num_m_blocks - (blocks.end - blocks.begin);
      --heads_left;
    }
  }
};

// The key block of a work tile. Longest first is the forward pass's order, whose longest block is
// the last one; here the first one is. last_first: the last one comes first all the same.
HOPPER_ATTENTION_HD constexpr int key_block(const TileOrder& order, const WorkTile& work,
                                            bool last_first) {
  const bool flip = order.longest_first && !last_first;
  return flip ? order.num_m_blocks - 1 - work.m_block : work.m_block;
}

// How many key blocks add to a query block before n_block does, where the order is fixed: those
// that come before it in the grid, so that a block only ever waits for blocks that run already.
HOPPER_ATTENTION_HD constexpr unsigned int add_turn(const Mask& mask, int n_block, int m_block,
                                                    int tile_m, int tile_n, bool last_first) {
  const int row_begin = m_block * tile_m;
  const int row_end = row_begin + tile_m < mask.seqlen_q ? row_begin + tile_m : mask.seqlen_q;
  const BlockRange blocks = key_blocks(mask, row_begin, row_end, tile_n);
  return static_cast<unsigned int>(last_first ? blocks.end - 1 - n_block : n_block - blocks.begin);
}

}  // namespace hopper_attention
