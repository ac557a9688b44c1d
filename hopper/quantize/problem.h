// What the quantizer's entry points check, and the kernels' parameters that follow.
#pragma once

#include "hopper_attention/abi.h"
#include "quantize/params.h"
#include "status.h"

namespace hopper_attention {

// Sizes and choices; reads no pointer.
Status check_quantize_shape(const hopper_attention_quantize_args& args);

// Pointers, alignment and strides of what the call reads and writes.
Status check_quantize_tensors(const hopper_attention_quantize_args& args);

QuantizeWorkspace quantize_workspace(const hopper_attention_quantize_args& args);

struct QuantizePlan {
  QuantizeParams params;
  QuantizeWorkspace workspace;
  int tile;  // head dimension of the instance
};

// From arguments that passed the checks; all but the schedule. Fails where there are more tiles
// than can be counted.
Status plan_quantize(const hopper_attention_quantize_args& args, QuantizePlan* plan);

// The blocks of threads that run at a time, of how many teams each, and how many tiles a block
// loads ahead.
struct QuantizeBlocks {
  int count, teams, stages;
};

// The order of the tiles.
void schedule_quantize(const QuantizeBlocks& blocks, QuantizePlan* plan);

}  // namespace hopper_attention
