// The quantizer's geometry: blocks of 128 tokens, their slots in packed batches, Hadamard blocks,
// and what the workspace holds.
#pragma once

#include <cstdint>

#include "hopper_attention/fp8.h"

#if defined(__CUDACC__)
#define HOPPER_ATTENTION_QUANTIZE_HD __host__ __device__
#else
#define HOPPER_ATTENTION_QUANTIZE_HD
#endif

namespace hopper_attention {

enum class ScaleKind : std::int32_t {
  kTensor = 0,
  kHead = 1,
  kBlock = 2,
  kToken = 3,
  kChannel = 4
};

inline constexpr int kQuantizeTokens = kScaleTokens;  // a thread block works on as many at a time

HOPPER_ATTENTION_QUANTIZE_HD constexpr std::int64_t round_up(std::int64_t value, std::int64_t to) {
  return (value + to - 1) / to * to;
}

// Blocks of a tensor: of one sequence, or of all where they are packed.
constexpr std::int64_t quantize_slots(std::int64_t seqlen, int batch, bool packed) {
  return packed ? seqlen / kQuantizeTokens + batch
                : (seqlen + kQuantizeTokens - 1) / kQuantizeTokens;
}

// The first slot of a packed sequence that begins at this token. Each has at least one slot, and
// enough for its tokens: floor(a + b) >= floor(a) + ceil(b) - 1.
HOPPER_ATTENTION_QUANTIZE_HD constexpr std::int64_t first_slot(std::int64_t first_token,
                                                               int sequence) {
  return first_token / kQuantizeTokens + sequence;
}

// log2 of the channels that one Walsh-Hadamard transform mixes: the largest power of two that
// divides head_dim, which is a multiple of 8.
constexpr int hadamard_log2(int head_dim) {
  int log2 = 0;
  while (head_dim % (2 << log2) == 0) ++log2;
  return log2;
}

// Division of 0 to 2^31 - 1 by a constant in a multiplication and a shift. With 2^(log2 - 1) <
// divisor <= 2^log2 and multiplier = floor(2^(31 + log2) / divisor) + 1, the quotient's error is
// below n / (divisor * 2^31) < 1 / divisor.
struct FastDivide {
  std::uint32_t multiplier = 0;
  std::int32_t shift = 0;
  std::int32_t divisor = 1;

  FastDivide() = default;
  constexpr explicit FastDivide(std::int32_t by) : divisor(by) {
    int log2 = 0;
    while ((std::int64_t{1} << log2) < by) ++log2;
    shift = 31 + log2;
    multiplier = static_cast<std::uint32_t>((std::uint64_t{1} << shift) / by + 1);
  }
  HOPPER_ATTENTION_QUANTIZE_HD constexpr std::int32_t quotient(std::int32_t n) const {
    return static_cast<std::int32_t>((static_cast<std::uint64_t>(n) * multiplier) >> shift);
  }
};

// The workspace: bits of the largest finite |x| (zero before the first pass) of whatever shares a
// scale, then the sums of K over each block of tokens.
struct QuantizeWorkspace {
  std::int64_t q_amax = 0, k_amax = 0, v_amax = 0;  // offsets in words
  std::int64_t amax_words = 0;                      // to be zeroed
  std::int64_t k_partial = 0;                       // offset in words
  std::int64_t words = 0;
};

constexpr QuantizeWorkspace quantize_workspace(std::int64_t batch, std::int64_t heads,
                                               std::int64_t heads_kv, std::int64_t head_dim,
                                               std::int64_t head_dim_v, std::int64_t slots_k,
                                               bool packed, bool smooth_k) {
  QuantizeWorkspace w;
  w.k_amax = w.q_amax + round_up(batch * heads, 4);
  w.v_amax = w.k_amax + round_up(batch * heads_kv, 4);
  w.amax_words = w.v_amax + round_up(batch * heads_kv * head_dim_v, 4);
  w.k_partial = w.amax_words;
  w.words = w.k_partial + (smooth_k ? (packed ? 1 : batch) * heads_kv * slots_k * head_dim : 0);
  return w;
}

}  // namespace hopper_attention
