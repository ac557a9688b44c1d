// Which keys a query row sees: causal masks and sliding windows, aligned bottom right.
#pragma once

#if defined(__CUDACC__)
#define HOPPER_ATTENTION_HD __host__ __device__
#else
#define HOPPER_ATTENTION_HD
#endif

namespace hopper_attention {

// Lengths stay below this, so that sums of two of them fit an int.
inline constexpr int kMaxLength = (1 << 30) - 1;

// Query row i stands at key position i + seqlen_k - seqlen_q and sees window_left keys before that
// position, itself, and window_right keys after it.
struct Mask {
  int seqlen_q;
  int seqlen_k;
  int window_left;   // 0 to seqlen_k; seqlen_k is unbounded
  int window_right;  // 0 to seqlen_q; seqlen_q is unbounded

  // The first key that row sees, and one past the last; no key when end_key <= first_key.
  HOPPER_ATTENTION_HD constexpr int first_key(int row) const {
    const int key = row + seqlen_k - seqlen_q - window_left;
    return key > 0 ? key : 0;
  }
  HOPPER_ATTENTION_HD constexpr int end_key(int row) const {
    const int key = row + seqlen_k - seqlen_q + window_right + 1;
    return key < seqlen_k ? (key > 0 ? key : 0) : seqlen_k;
  }
  // The first row that sees key, and one past the last; no row when end_row <= first_row.
  HOPPER_ATTENTION_HD constexpr int first_row(int key) const {
    const int row = key - (seqlen_k - seqlen_q) - window_right;
    return row > 0 ? row : 0;
  }
  HOPPER_ATTENTION_HD constexpr int end_row(int key) const {
    const int row = key - seqlen_k + seqlen_q + window_left + 1;
    return row < seqlen_q ? (row > 0 ? row : 0) : seqlen_q;
  }
  // The most keys that a row sees, or a little more. Lengths are small enough for the sum.
  constexpr int most_keys() const {
    const int width = window_left + 1 + window_right;
    return width < seqlen_k ? width : seqlen_k;
  }
  constexpr bool full() const { return window_left >= seqlen_k && window_right >= seqlen_q; }
};

// From a caller's arguments, where a negative window is unbounded and causal means window_right =
// 0. A left window of seqlen_k - 1 keys reaches key 0 from every row, a right one of seqlen_q - 1
// the last key: wider ones are made unbounded, so that sums cannot overflow.
constexpr Mask make_mask(int seqlen_q, int seqlen_k, bool causal, int window_left,
                         int window_right) {
  if (causal) window_right = 0;
  const bool left_open = window_left < 0 || window_left >= seqlen_k - 1;
  const bool right_open = window_right < 0 || window_right >= seqlen_q - 1;
  return {seqlen_q, seqlen_k, left_open ? seqlen_k : window_left,
          right_open ? seqlen_q : window_right};
}

}  // namespace hopper_attention
