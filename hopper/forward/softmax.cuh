// Online softmax of one consumer's score tile, two rows a thread.
#pragma once

#include <cute/tensor.hpp>

#include "hopper_attention/fragment.h"

namespace hopper_attention {

// The rest of a row lies in the other three lanes of a quad.
template <class Op>
CUTE_DEVICE float quad_reduce(float value, Op op) {
  value = op(value, __shfl_xor_sync(0xffffffff, value, 2));
  return op(value, __shfl_xor_sync(0xffffffff, value, 1));
}

// threadIdx.x, read anew each time: what is made of it in a seldom taken path is not kept in
// registers or local memory through the loop.
CUTE_DEVICE int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Ends a row whose P, exp2(exponent - shift), sum to total: adds the head's sink to the sum, a
// logit without a value (-inf: none), and returns what O is to be multiplied by. A sink above the
// maximum takes its place as the reference, so that no power overflows. A row without keys gets 0,
// and the sink as its log-sum-exp. Without branches: they would make ptxas arrange the loops anew.
CUTE_DEVICE float finish_row(float total, float shift, float sink, float& lse) {
  const bool empty = total == 0.0f;
  const float sink_log2 = sink * 1.442695040888963407f;
  const float ahead = shift - sink_log2;
  const bool below = ahead < 0.0f;  // false for NaN, which the sum then shows
  const float weight = exp2f(below ? ahead : 0.0f);
  total = fmaf(total, weight, exp2f(below ? 0.0f : -ahead));
  const float reference = below ? sink_log2 : shift;
  lse = empty ? sink : (reference + log2f(total)) * 0.693147180559945309f;
  return empty ? 0.0f : weight * (1.0f / total);
}

struct Softmax {
  float scale_log2;
  float reference[kRowsPerThread] = {-INFINITY, -INFINITY};  // the running maximum, in scores
  float sum[kRowsPerThread] = {0.0f, 0.0f};                  // this thread's part of the row sum
  float shift[kRowsPerThread] = {};                          // reference * scale_log2
  float alpha[kRowsPerThread] = {};                          // what O is to be multiplied by

  // The maximum of this thread's part of a row, and of seed, in kChains that do not wait for one
  // another.
  template <int kChains = 1, class Scores>
  CUTE_DEVICE static float thread_max(Scores const& s, int row, float seed = -INFINITY) {
    float result[kChains];
    result[0] = fmaxf(seed, s(fragment_index(row, 0)));
    CUTE_UNROLL
    for (int j = 1; j < kChains; ++j) result[j] = s(fragment_index(row, j));
    CUTE_UNROLL
    for (int j = kChains; j < decltype(cute::size(s))::value / kRowsPerThread; ++j) {
      result[j % kChains] = fmaxf(result[j % kChains], s(fragment_index(row, j)));
    }
    CUTE_UNROLL
    for (int j = 1; j < kChains; ++j) result[0] = fmaxf(result[0], result[j]);
    return result[0];
  }

  // Takes a block's maximum of a row in, of which a thread has a part; O is then owed alpha. The
  // reference always follows the maximum: if it lagged a little, O would seldom need rescaling, but
  // the largest P would not be exactly 1, and its rounding would raise the error of rows with one
  // dominant key by 9 to 22%.
  // kMayBeEmpty: the row may have seen no key so far. All its scores are -inf then, and stay so
  // whatever finite number is subtracted.
  template <bool kMayBeEmpty>
  CUTE_DEVICE void take_maximum(float part, int row) {
    const float previous = reference[row];
    const float block_max = quad_reduce(part, [](float a, float b) { return fmaxf(a, b); });
    reference[row] = fmaxf(previous, block_max);
    const bool empty = kMayBeEmpty && reference[row] == -INFINITY;
    const float subtrahend = empty ? 0.0f : reference[row];
    shift[row] = subtrahend * scale_log2;
    // The difference first: alpha is exactly 1 where the reference stays. As one fused multiply-add
    // with shift it would be off by that product's rounding, and a million keys take 8,000 alphas.
    alpha[row] = exp2f((previous - subtrahend) * scale_log2);
  }

  // S -> P = exp2(scale_log2 * (S - reference)) in place for one row, and P's sum. The block is
  // summed by itself first: a million terms added one by one would lose three digits.
  // kAlphaFirst: the sum begins at 0 * alpha, or ptxas would compute alpha and rescale O last.
  template <bool kAlphaFirst = false, class Scores>
  CUTE_DEVICE void exponentiate(Scores& s, int row) {
    float block_sum = 0.0f;
    CUTE_UNROLL
    for (int j = 0; j < decltype(cute::size(s))::value / kRowsPerThread; ++j) {
      const int i = fragment_index(row, j);
      s(i) = exp2f(fmaf(s(i), scale_log2, -shift[row]));
      block_sum = kAlphaFirst && j == 0 ? fmaf(alpha[row], 0.0f, s(i)) : block_sum + s(i);
    }
    sum[row] = fmaf(sum[row], alpha[row], block_sum);
  }

  // Whether some row of this warp moved its reference: else alpha is 1 for all of them.
  CUTE_DEVICE bool owes_rescale() const {
    return __any_sync(0xffffffff, alpha[0] != 1.0f || alpha[1] != 1.0f);
  }

  template <class Output>
  CUTE_DEVICE void rescale(Output& o) const {
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(o))::value; ++i) o(i) *= alpha[fragment_row(i)];
  }

  // Adds the head's sink to the row sums and returns each row's log-sum-exp; O is then owed alpha,
  // which divides it by the sum.
  CUTE_DEVICE void finish_rows(float sink, float (&lse)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float total = quad_reduce(sum[row], [](float a, float b) { return a + b; });
      alpha[row] = finish_row(total, reference[row] * scale_log2, sink, lse[row]);
    }
  }
};

}  // namespace hopper_attention
