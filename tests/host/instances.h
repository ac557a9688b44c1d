// The rows of hopper/forward/instances.def, for the host tests.
#pragma once

#include "hopper_attention/key.h"

namespace hopper_attention {

struct InstanceRow {
  const char* name;
  ForwardKey key;
};

inline constexpr InstanceRow kInstanceRows[] = {
#define HOPPER_ATTENTION_FORWARD(name, dtype, head_dim, head_dim_v, mask) \
  {#name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}},
#include "forward/instances.def"
#undef HOPPER_ATTENTION_FORWARD
};

}  // namespace hopper_attention
