// TMA descriptors of (head_dim, sequence, head, batch) tensors, encoded on the host.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace hopper_attention {

enum class TensorType { kFloat16, kBfloat16, kByte };

constexpr int bytes_of(TensorType type) { return type == TensorType::kByte ? 1 : 2; }

struct TensorView {
  const void* data;
  int head_dim;  // the innermost, contiguous one; keys where V is stored transposed
  int seqlen;
  int heads;
  int batch;
  std::int64_t stride_seq;  // elements
  std::int64_t stride_head;
  std::int64_t stride_batch;
};

struct TensorBox {
  int columns;  // one swizzle atom: its bytes are the swizzle's width, 32, 64 or 128
  int rows;
};

// Null when encoded; else a sentence about what failed. Reads beyond the tensor give zeros, writes
// beyond it are dropped: this is how odd lengths and head dimensions run in whole tiles.
const char* encode_tensor_map(CUtensorMap* map, const TensorView& view, TensorBox box,
                              TensorType type);

// Likewise with the dimensions (head_dim, row, heads, shift, wrap) of ragged.h, for a tensor of
// sequences of any lengths (its batch is not taken). Not packed: (head_dim, seqlen, heads, batch,
// 1) for the same kernels.
const char* encode_ragged_tensor_map(CUtensorMap* map, const TensorView& view, bool packed,
                                     TensorBox box, TensorType type);

}  // namespace hopper_attention
