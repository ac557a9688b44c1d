// Attention in e4m3: how scales fold into the arithmetic, and in which order V's keys are stored.
#pragma once

#if defined(__CUDACC__)
#define HOPPER_ATTENTION_FP8_HD __host__ __device__
#else
#define HOPPER_ATTENTION_FP8_HD
#endif

namespace hopper_attention {

inline constexpr float kE4M3Max = 448.0f;

// Tokens of a block with one scale, and keys of a block of V that is stored transposed.
inline constexpr int kScaleTokens = 128;

// P = exp2(x - max + kOffsetLog2) lies in [0, 256] and so uses e4m3's normal range down to 2^-14 of
// the row's largest. O and the row sum carry the same factor.
inline constexpr int kOffsetLog2 = 8;

// Keys of a group that is stored in another order.
inline constexpr int kSlots = 16;

// Which key of its group lies in a slot of a transposed V. A thread's accumulator of S has columns
// 2a and 2a + 1 of every 8, but as the second product's e4m3 operand it must hold four neighbours:
// V's keys are permuted the same way, and P stays where it is.
HOPPER_ATTENTION_FP8_HD constexpr int key_of_slot(int slot) {
  const int quad = slot / 4, i = slot % 4;
  return i < 2 ? 2 * quad + i : 8 + 2 * quad + i - 2;
}

}  // namespace hopper_attention
