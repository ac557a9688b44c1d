// Where an element of dQ lies in its fp32 accumulator.
//
// The accumulator of one block of queries is tile_m x head_dim numbers in one piece, in the order
// in which the consumers' threads hold them: 16 bytes a thread at a time. So they reach shared
// memory without bank conflicts and global memory as one bulk reduction, and only the last kernel,
// which rounds dQ to 16 bits, needs to know the order.
#pragma once

#include "hopper_attention/backward_config.h"
#include "hopper_attention/fragment.h"

namespace hopper_attention {

struct DqPosition {
  int row;
  int column;
};

struct DqLayout {
  DqSplit split;
  int tile_m;
  int head_dim;
  int num_consumers;
  int slices;  // of kColumns; else 1

  HOPPER_ATTENTION_HD constexpr int elements() const { return tile_m * head_dim; }

  // Of the first of four neighbours at 4 * group. The second is one column to its right, the third
  // and fourth lie eight rows below these two.
  HOPPER_ATTENTION_HD constexpr DqPosition operator()(int group) const {
    const int consumer_groups = elements() / (4 * num_consumers);
    const int consumer = group / consumer_groups;
    const int within = group % consumer_groups;
    const int thread = within % 128;
    const int row = fragment_first_row(thread);
    const int column = within / 128 * 8 + thread % 4 * 2;
    if (split == DqSplit::kRows) return {consumer * 64 + row, column};
    const int piece = head_dim / (num_consumers * slices);
    return {row, (column / piece * num_consumers + consumer) * piece + column % piece};
  }
};

constexpr bool operator==(const DqLayout& a, const DqLayout& b) {
  return a.split == b.split && a.tile_m == b.tile_m && a.head_dim == b.head_dim &&
         a.num_consumers == b.num_consumers && a.slices == b.slices;
}

// By columns in one slice, consumers follow one another as their columns do: the layout is the same
// for any number of them.
constexpr DqLayout make_dq_layout(const BackwardConfig& config) {
  if (config.dq_split == DqSplit::kColumns && config.dq_slices == 1)
    return {config.dq_split, config.tile_m, config.key.head_dim, 1, 1};
  return {config.dq_split, config.tile_m, config.key.head_dim, config.num_consumers,
          config.dq_slices};
}

}  // namespace hopper_attention
