// The TMA descriptors of a forward call.
#pragma once

#include "forward/params.h"
#include "forward/problem.h"

namespace hopper_attention {

// Fills params->q, k, v and out, for arguments that were checked.
Status encode_descriptors(const hopper_attention_forward_args& args, const ForwardPlan& plan,
                          ForwardParams* params);

}  // namespace hopper_attention
