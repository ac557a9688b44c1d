// What a generated translation unit includes: the macro defines the launcher of one row of
// instances.def.
#pragma once

#include "forward/launch.cuh"
#include "hopper_attention/config.h"

#define HOPPER_ATTENTION_DEFINE_FORWARD(name, dtype, head_dim, head_dim_v, mask)    \
  namespace hopper_attention {                                                      \
  struct name {                                                                     \
    static constexpr ForwardConfig kConfig =                                        \
        make_forward_config({Dtype::dtype, head_dim, head_dim_v, MaskKind::mask});  \
  };                                                                                \
  cudaError_t forward_##name(const ForwardParams& params, const LaunchSpec& spec) { \
    return launch_forward<name>(params, spec);                                      \
  }                                                                                 \
  } /* namespace hopper_attention */
