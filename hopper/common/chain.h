// The kernels of a call as a chain (programmatic dependent launch): one may start when all blocks
// of the one before it have.
//
// The first of the chain is launched like any other, after all that is before it on the stream, or
// waits for that before it lets the next one start: so what the caller gave may be read, and what
// nobody in the chain reads be written, at once. What the chain itself reads, adds to or writes
// again comes behind the wait, which every block of a later kernel reaches before it ends: so when
// the last kernel has ended all have, and what follows on the stream may overwrite what they used.
#pragma once

#include <cuda_runtime.h>

namespace hopper_attention {

// Of a kernel that another one of the chain follows; in every block, as early as it likes.
__device__ inline void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}
// Until the kernel before has ended, and what it wrote can be read.
__device__ inline void wait_for_last_kernel() {
  asm volatile("griddepcontrol.wait;" : : : "memory");
}

// The attribute of a launch that need not wait.
inline cudaLaunchAttribute early_start() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

}  // namespace hopper_attention
