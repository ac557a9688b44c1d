// Packed batches for the host tests, drawn at random, and which keys their rows see.
#pragma once

#include <climits>
#include <random>
#include <vector>

#include "hopper_attention/packed.h"

namespace hopper_attention {

inline std::mt19937 generator(20261121);

inline int draw(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(generator);
}

struct Batch {
  std::vector<int> cu_q{0}, cu_k{0}, used_q, used_k;
  int behind_q = 0, behind_k = 0;  // rows behind the last sequence

  int size() const { return static_cast<int>(used_q.size()); }
  void add(int rows, int keys, int asking, int seen) {
    cu_q.push_back(cu_q.back() + rows), cu_k.push_back(cu_k.back() + keys);
    used_q.push_back(asking), used_k.push_back(seen);
  }
  PackedLengths lengths(bool with_used) const {
    return {cu_q.data(),
            cu_k.data(),
            with_used ? used_q.data() : nullptr,
            with_used ? used_k.data() : nullptr,
            size(),
            cu_q.back() + behind_q,
            cu_k.back() + behind_k};
  }
};

inline Batch draw_batch(int longest) {
  Batch batch;
  const int size = draw(0, 12);
  for (int i = 0; i < size; ++i) {
    const int rows = draw(0, 3) == 0 ? 0 : draw(0, longest);
    const int keys = draw(0, 3) == 0 ? 0 : draw(0, longest);
    batch.add(rows, keys, draw(0, rows), draw(0, keys));
  }
  batch.behind_q = draw(0, 1) * draw(0, longest), batch.behind_k = draw(0, 1) * draw(0, longest);
  return batch;
}

inline int draw_nonsense(int total) {
  constexpr int kExtremes[] = {INT_MIN, INT_MIN + 1, -1, 0, 1, INT_MAX - 1, INT_MAX};
  return draw(0, 2) == 0 ? kExtremes[draw(0, 6)] : draw(-total, 2 * total);
}

// abi.h's definition; -1 is unbounded.
inline bool sees(int seqlen_q, int seqlen_k, int left, int right, int row, int key) {
  const int position = row + seqlen_k - seqlen_q;
  return (left < 0 || key >= position - left) && (right < 0 || key <= position + right);
}

}  // namespace hopper_attention
