// In which order a block of keys goes through the queries that see it, and key blocks through the
// adds to one query block's dQ.
#pragma once

#include <cstdint>

#include "hopper_attention/block_range.h"
#include "hopper_attention/tile_order.h"

namespace hopper_attention {

// Query blocks of all query heads of a KV head's group. Ascending, the heads follow one another;
// descending, the query blocks do from the last on, each with all its heads. Either is rounds of so
// many steps, a move from step to step and one more from round to round: a branch for each order
// would cost the main kernel 4%.
struct QuerySteps {
  struct Move {
    int m_block;
    int head;
    int block;
  };

  int m_block;
  std::int64_t block;  // of the workspace
  Move step, round;
  int steps;  // of a round
  int steps_left;
  int rounds_left;
  int own_head;

  // first_block: of the workspace, the first head's query block 0, of num_m_blocks a head.
  HOPPER_ATTENTION_HD constexpr QuerySteps(BlockRange blocks, int heads, int num_m_blocks,
                                           bool descending, std::int64_t first_block)
      : m_block(descending ? blocks.end - 1 : blocks.begin),
        block(first_block + m_block),
        step(descending ? Move{0, 1, num_m_blocks} : Move{1, 0, 1}),
        round(),
        steps(descending ? heads : blocks.end - blocks.begin),
        steps_left(steps),
        rounds_left(blocks.empty() || heads == 0 ? 0
                    : descending                 ? blocks.end - blocks.begin
                                                 : heads),
        own_head(0) {
    round = descending ? Move{-1, -steps, -steps * num_m_blocks - 1}
                       : Move{-steps, 1, num_m_blocks - steps};
  }

  HOPPER_ATTENTION_HD constexpr bool done() const { return rounds_left == 0; }
  HOPPER_ATTENTION_HD constexpr bool last() const { return rounds_left == 1 && steps_left == 1; }
  HOPPER_ATTENTION_HD constexpr int head() const { return own_head; }  // of the group
  HOPPER_ATTENTION_HD constexpr void advance() {
    move(step);
    if (--steps_left > 0) return;
    move(round);
    steps_left = steps;
    --rounds_left;
  }

 private:
  HOPPER_ATTENTION_HD constexpr void move(Move const& by) {
    m_block += by.m_block;
    own_head += by.head;
    block += by.block;
  }
};

// The key block of a work tile. Longest first is the forward pass's order, whose longest block is
// the last one; here the first one is. last_first: the last one comes first all the same.
HOPPER_ATTENTION_HD constexpr int key_block(const TileOrder& order, const WorkTile& work,
                                            bool last_first) {
  const bool flip = order.longest_first && !last_first;
  return flip ? order.num_m_blocks - 1 - work.m_block : work.m_block;
}

// How many key blocks add to a query block before those of n_block's cluster do, where the order is
// fixed: those that come before it in the grid, so that a block only ever waits for blocks that run
// already. cluster: blocks of neighbouring keys that go through the same query blocks together, all
// that see a key of one of them; 1 where each goes alone.
HOPPER_ATTENTION_HD constexpr unsigned int add_turn(const Mask& mask, int n_block, int m_block,
                                                    int tile_m, int tile_n, bool last_first,
                                                    int cluster = 1) {
  const int row_begin = m_block * tile_m;
  const int row_end = row_begin + tile_m < mask.seqlen_q ? row_begin + tile_m : mask.seqlen_q;
  const BlockRange clusters = key_blocks(mask, row_begin, row_end, cluster * tile_n);
  const int own = n_block / cluster;
  return static_cast<unsigned int>(cluster *
                                   (last_first ? clusters.end - 1 - own : own - clusters.begin));
}

// Whether a block may add that was given `own` by add_turn, when `added` have. Blocks of a cluster
// add to columns of their own, so they have their turn together.
HOPPER_ATTENTION_HD constexpr bool turn_has_come(unsigned int added, unsigned int own,
                                                 int cluster) {
  return added - own < static_cast<unsigned int>(cluster);
}

}  // namespace hopper_attention
