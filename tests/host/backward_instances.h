// The rows of hopper/backward/instances.def, for the host tests.
#pragma once

#include "hopper_attention/backward_config.h"

namespace hopper_attention {

struct BackwardInstanceRow {
  const char* name;
  BackwardKey key;
};

inline constexpr BackwardInstanceRow kBackwardInstanceRows[] = {
#define HOPPER_ATTENTION_BACKWARD(name, dtype, head_dim, head_dim_v, mask) \
  {#name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}},
#include "backward/instances.def"
#undef HOPPER_ATTENTION_BACKWARD
};

}  // namespace hopper_attention
