// How TMA reads and writes single sequences of a packed tensor, (total, heads, head_dim), and
// nothing of their neighbours.
//
// TMA checks coordinates against the tensor's sizes, not against a sequence's end, which lies on
// the device. But it adds up addresses modulo 2^64. So the tensor is described with three
// dimensions for its rows: `row` of kRaggedRows rows, `shift` and `wrap`, the first two with a
// row's stride s, the third with one of -s modulo 2^34. A sequence of `length` rows from `begin`
// on has its row i at
//   row = kRaggedRows - length + i,  shift = begin + length,  wrap = kRaggedRows,
// which all together is begin + i rows: kRaggedRows * (s + wrap's stride) is a multiple of 2^64.
// Row `length` is then outside of the tensor: it is read as zeros and not written. (The idea is
// that of Triton's ragged descriptors.)
#pragma once

#include <cstdint>

#include "hopper_attention/mask.h"

namespace hopper_attention {

inline constexpr int kRaggedRows = 1 << 30;
inline constexpr int kMaxShift = 0x7fff0000;  // shift's and wrap's sizes: never reached
static_assert(kMaxLength < kRaggedRows, "a sequence fits");

// In bytes, for a row's stride in bytes: 0 to 2^34.
constexpr std::uint64_t wrap_stride(std::uint64_t row_stride) {
  constexpr std::uint64_t kModulus = std::uint64_t{1} << 34;
  return kModulus - row_stride % kModulus;
}

// Coordinates of a sequence's first row. Dense tensors have no shift and no wrap, but a batch.
struct RowOrigin {
  int row;
  int shift;  // or batch
};

HOPPER_ATTENTION_HD constexpr RowOrigin ragged_origin(int begin, int length) {
  return {kRaggedRows - length, begin + length};
}

}  // namespace hopper_attention
