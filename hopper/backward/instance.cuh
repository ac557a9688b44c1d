// What a generated translation unit includes: the macro defines the launcher of one row of
// instances.def.
#pragma once

#include "backward/launch.cuh"
#include "hopper_attention/backward_config.h"

// The struct's name is not the row's: a forward instance may have that.
#define HOPPER_ATTENTION_DEFINE_BACKWARD(name, dtype, head_dim, head_dim_v, mask)             \
  namespace hopper_attention {                                                                \
  struct Backward_##name {                                                                    \
    static constexpr BackwardConfig kConfig =                                                 \
        make_backward_config({Dtype::dtype, head_dim, head_dim_v, MaskKind::mask});           \
  };                                                                                          \
  cudaError_t backward_##name(const BackwardParams& params, const BackwardLaunchSpec& spec) { \
    return launch_backward<Backward_##name>(params, spec);                                    \
  }                                                                                           \
  } /* namespace hopper_attention */
