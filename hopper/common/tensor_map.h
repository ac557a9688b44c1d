// TMA descriptors of (head_dim, sequence, head, batch) tensors, encoded on the host.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace hopper_attention {

struct TensorView {
  const void* data;
  int head_dim;
  int seqlen;
  int heads;
  int batch;
  std::int64_t stride_seq;  // elements
  std::int64_t stride_head;
  std::int64_t stride_batch;
};

struct TensorBox {
  int columns;  // one swizzle atom: its bytes are the swizzle's width, 64 or 128
  int rows;
};

// Null when encoded; else a sentence about what failed. Reads beyond the tensor give zeros, writes
// beyond it are dropped: this is how odd lengths and head dimensions run in whole tiles.
const char* encode_tensor_map(CUtensorMap* map, const TensorView& view, TensorBox box,
                              bool bfloat16);

}  // namespace hopper_attention
