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
  int tile;          // head dimension of the instance
  bool second_amax;  // K's largest values can be found only once its mean is known
};

// From arguments that passed the checks. Fails where there are more tasks than can be counted.
Status plan_quantize(const hopper_attention_quantize_args& args, QuantizePlan* plan);

}  // namespace hopper_attention
