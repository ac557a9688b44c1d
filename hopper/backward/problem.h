// From the caller's arguments to a problem (what is asked) and a plan (how it will run).
#pragma once

#include <cstdint>

#include "hopper_attention/abi.h"
#include "hopper_attention/backward_config.h"
#include "hopper_attention/backward_packed.h"
#include "hopper_attention/dq_layout.h"
#include "hopper_attention/mask.h"
#include "hopper_attention/tile_order.h"
#include "status.h"

namespace hopper_attention {

struct BackwardPlan {
  BackwardKey key;
  BackwardConfig config;
  Mask mask;
  TileOrder order;  // of key blocks and KV heads
  DqLayout dq_layout;
  bool descending;           // QuerySteps'
  bool last_first;           // key_block's and add_turn's
  int num_m_blocks;          // a (batch, head); of a packed batch a head, at most
  int query_grid;            // blocks of queries in all
  int key_grid;              // blocks of keys in all
  PackedOrder packed_order;  // of a packed batch, as is the rest
  int max_key_entries;       // key blocks or clusters of them a KV head, at most
  float scale_log2;
  float cap_log2;
  float inner_scale;
};

// Byte offsets into the workspace, and its size.
struct WorkspaceLayout {
  std::uint64_t lse_log2;
  std::uint64_t delta;
  std::uint64_t turns;
  std::uint64_t tickets;
  std::uint64_t key_list;
  std::uint64_t bytes;
};

// Checks everything but the pointers: shapes, dtypes, windows, scales.
Status check_backward_shape(const hopper_attention_backward_args& args);

// Checks pointers, their alignment and strides.
Status check_backward_tensors(const hopper_attention_backward_args& args);

// For arguments whose shape was checked.
Status plan_backward(const hopper_attention_backward_args& args, BackwardPlan* plan);

WorkspaceLayout workspace_layout(const BackwardPlan& plan, bool packed, bool deterministic);

}  // namespace hopper_attention
