// Which key blocks a block of queries visits, and which of them need a mask; and the other way
// round: which query blocks a block of keys is seen by.
#pragma once

#include "hopper_attention/mask.h"

namespace hopper_attention {

struct BlockRange {
  int begin;
  int end;  // begin >= end: no key is seen
  HOPPER_ATTENTION_HD constexpr bool empty() const { return begin >= end; }
};

// Key blocks of tile_n keys that any query row in [row_begin, row_end) sees.
HOPPER_ATTENTION_HD constexpr BlockRange key_blocks(const Mask& mask, int row_begin, int row_end,
                                                    int tile_n) {
  const int first = mask.first_key(row_begin);
  const int last = mask.end_key(row_end - 1);  // limits rise with the row
  if (last <= first) return {0, 0};
  return {first / tile_n, (last + tile_n - 1) / tile_n};
}

// The same without a mask, where a tile need not have a row.
HOPPER_ATTENTION_HD constexpr BlockRange all_key_blocks(const Mask& mask, int tile_n) {
  return {0, (mask.seqlen_k + tile_n - 1) / tile_n};
}

// Key blocks of which every row in [row_begin, row_end) sees the whole; the others need a mask.
HOPPER_ATTENTION_HD constexpr BlockRange plain_blocks(const Mask& mask, int row_begin, int row_end,
                                                      int tile_n) {
  const int first = mask.first_key(row_end - 1);  // limits rise with the row
  const int last = mask.end_key(row_begin);
  const BlockRange blocks{(first + tile_n - 1) / tile_n, last / tile_n};
  return blocks.empty() ? BlockRange{0, 0} : blocks;
}

// Whether a consumer takes a turn at key block n_block of a tile's `blocks`, where its first
// product of a tile needs none (ForwardConfig::free_first). own: the blocks that its rows see,
// maybe none. A block that it skips takes one like any other, so that each consumer takes one less
// than `blocks` has: turns go round, and one consumer's too many is a hang.
HOPPER_ATTENTION_HD constexpr bool takes_turn(BlockRange blocks, BlockRange own, int n_block) {
  return n_block != (own.empty() ? blocks.end : own.end) - 1;
}

// Whether rows before row_end see no key of key block n_block but its first num_keys.
HOPPER_ATTENTION_HD constexpr bool ends_within(const Mask& mask, int row_end, int n_block,
                                               int tile_n, int num_keys) {
  return mask.end_key(row_end - 1) - n_block * tile_n <= num_keys;  // limits rise with the row
}

// Query blocks of tile_m rows with a row that sees any key in [key_begin, key_end).
HOPPER_ATTENTION_HD constexpr BlockRange query_blocks(const Mask& mask, int key_begin, int key_end,
                                                      int tile_m) {
  const int first = mask.first_row(key_begin);
  const int last = mask.end_row(key_end - 1);  // limits rise with the key
  if (last <= first) return {0, 0};
  return {first / tile_m, (last + tile_m - 1) / tile_m};
}

// Query blocks of which every row sees all keys in [key_begin, key_end); the others need a mask.
HOPPER_ATTENTION_HD constexpr BlockRange plain_query_blocks(const Mask& mask, int key_begin,
                                                            int key_end, int tile_m) {
  const int first = mask.first_row(key_end - 1);  // limits rise with the key
  const int last = mask.end_row(key_begin);
  const BlockRange blocks{(first + tile_m - 1) / tile_m, last / tile_m};
  return blocks.empty() ? BlockRange{0, 0} : blocks;
}

}  // namespace hopper_attention
