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

// The order of the tiles, for blocks that have `ahead` tiles in work among them.
void schedule_quantize(int ahead, QuantizePlan* plan);

}  // namespace hopper_attention
