// From the caller's arguments to a problem (what is asked) and a plan (how it will run).
#pragma once

#include <string>

#include "hopper_attention/abi.h"
#include "hopper_attention/config.h"
#include "hopper_attention/fp8.h"
#include "hopper_attention/mask.h"
#include "hopper_attention/packed.h"
#include "hopper_attention/tile_order.h"
#include "status.h"

namespace hopper_attention {

struct ForwardPlan {
  ForwardKey key;
  ForwardConfig config;
  Mask mask;
  TileOrder order;           // of a dense batch
  PackedOrder packed_order;  // of a packed one
  int num_tiles;             // at most, where a packed batch's lengths are not known here
  int grid;
  int cluster;  // blocks that share their loads of K and V; the order counts as many tiles as one
  float scale_log2;
  bool transform_scores;
  float inner_scale;
  float cap;
  ScaleParams scales;
};

// Checks everything but the pointers: shapes, dtypes, windows, scales.
Status check_forward_shape(const hopper_attention_forward_args& args);

// Checks pointers, their alignment and strides, as TMA wants them.
Status check_forward_tensors(const hopper_attention_forward_args& args);

// The part of it that packed batches have: lengths on the device.
Status check_packed_tensors(const hopper_attention_forward_args& args);

// For arguments whose shape was checked. num_sms: multiprocessors of the device.
Status plan_forward(const hopper_attention_forward_args& args, int num_sms, ForwardPlan* plan);

}  // namespace hopper_attention
