// Which elements of a warpgroup's 64 x N accumulator a thread has: element i lies in row
// fragment_first_row + 8 * fragment_row(i) and in column 2 * (lane % 4) + fragment_column(i).
#pragma once

#include "hopper_attention/mask.h"

namespace hopper_attention {

inline constexpr int kRowsPerThread = 2;

HOPPER_ATTENTION_HD constexpr int fragment_row(int i) { return i / 2 % 2; }
HOPPER_ATTENTION_HD constexpr int fragment_column(int i) { return 8 * (i / 4) + i % 2; }
// The j-th element of a row.
HOPPER_ATTENTION_HD constexpr int fragment_index(int row, int j) {
  return j / 2 * 4 + row * 2 + j % 2;
}

// thread: 0 to 127, signed or not as the caller computes with it; origin: the fragment's first row.
template <class Integer>
HOPPER_ATTENTION_HD constexpr Integer fragment_first_row(Integer thread, Integer origin = 0) {
  return origin + thread / 32 * 16 + thread % 32 / 4;
}

}  // namespace hopper_attention
