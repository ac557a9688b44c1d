// Attention in e4m3: how scales fold into the arithmetic, and in which order V's keys are stored.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HOPPER_ATTENTION_FP8_HD __host__ __device__
#else
#define HOPPER_ATTENTION_FP8_HD
#endif

namespace hopper_attention {

inline constexpr float kE4M3Max = 448.0f;

// Tokens of a block with one scale, and keys of a block of V that is stored transposed.
inline constexpr int kScaleTokens = 128;

// P = exp2(x - reference + kOffsetLog2), where the reference is the row's maximum or up to
// kMaximumSlack below it: P lies in [0, 448] and uses e4m3's normal range down to 2^-13 of the
// row's largest. O and the row sum carry the same factor. 2^8 would leave a slack of 0.8, and
// references that move so often cost 4 to 7% of the cycles.
inline constexpr int kOffsetLog2 = 7;

// How far, in base-2 exponents, scores may rise above the reference before it follows: P stays
// within e4m3's 448. Only where the row sum is of P as rounded (budget.h's sums_by_ones): there a
// largest P that is no power of two costs nothing, elsewhere its rounding would.
inline constexpr float kMaximumSlack = 1.8f;

// Keys of a group that is stored in another order.
inline constexpr int kSlots = 16;

// Which key of its group lies in a slot of a transposed V. A thread's accumulator of S has columns
// 2a and 2a + 1 of every 8, but as the second product's e4m3 operand it must hold four neighbours:
// V's keys are permuted the same way, and P stays where it is.
HOPPER_ATTENTION_FP8_HD constexpr int key_of_slot(int slot) {
  const int quad = slot / 4, i = slot % 4;
  return i < 2 ? 2 * quad + i : 8 + 2 * quad + i - 2;
}

// Scales of e4m3 tensors: what a stored value is to be multiplied by. A null pointer is 1. Strides
// are in floats.
struct ScaleParams {
  const float* q;               // (batch, heads or heads_kv, 1 or blocks or seqlen_q)
  const float* k;               // (batch, heads_kv, 1 or blocks or seqlen_k)
  const float* v;               // (batch, heads_kv, 1 or head_dim_v)
  const float* v_token_factor;  // (batch, heads_kv, seqlen_k), of a token over v
  std::int64_t q_stride_batch, q_stride_head;
  std::int64_t k_stride_batch, k_stride_head;
  std::int64_t v_stride_batch, v_stride_head, v_stride_channel;
  std::int64_t v_token_stride_batch, v_token_stride_head;
  int q_shift, k_shift;  // a scale's index is the token's, shifted right by this
  bool q_per_kv;         // q has a row for each of heads_kv heads
};

}  // namespace hopper_attention
