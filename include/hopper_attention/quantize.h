// The quantizer's geometry: blocks of 128 tokens, their slots in packed batches, Hadamard blocks,
// and what the workspace holds.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "hopper_attention/fast_divide.h"
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

inline constexpr int kQuantizeTokens = kScaleTokens;  // of a tile

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

// More blocks of threads than run at a time on any of these cards; there are no more.
inline constexpr int kMaxQuantizeBlocks = 512;

// What the workspace is for.
struct QuantizeExtent {
  std::int64_t batch, heads, heads_kv, head_dim, head_dim_v;
  std::int64_t slots_q, slots_k;  // quantize_slots()
  bool packed, smooth_k;
  ScaleKind qk_scale, v_scale;
};

// The workspace, in words. First what is zero before the first tile: the number of the next ticket,
// and what tiles of q, k and v found. Then the sums of K over each block of tokens.
//
// Where a head or a tensor shares a scale, `found` has two words a tile or two a block of threads,
// see found.cuh. For scales of channels, and those of heads that v's tokens refer to, all tiles
// raise `amax`, the bits of the largest finite |x|, and `infinite`, and are counted in `measured`.
struct QuantizeWorkspace {
  struct Tensor {
    std::int64_t found = 0, measured = 0, infinite = 0, amax = 0;
  };
  std::int64_t ticket = 0;
  Tensor tensors[3];  // by QuantizeWhich
  std::int64_t zero_words = 0;
  std::int64_t k_partial = 0;
  std::int64_t words = 0;
};

enum QuantizeWhich { kV = 0, kQ = 1, kK = 2 };

constexpr QuantizeWorkspace quantize_workspace(const QuantizeExtent& of) {
  QuantizeWorkspace w;
  const std::int64_t sequences = of.packed ? 1 : of.batch;  // packed ones share counters
  std::int64_t end = 0;
  const auto take = [&](std::int64_t words) {
    const std::int64_t begin = end;
    end += round_up(words, 4);
    return begin;
  };
  w.ticket = take(32);  // a cache line that nothing else is in
  for (int which : {kV, kQ, kK}) {
    const ScaleKind scale = which == kV ? of.v_scale : of.qk_scale;
    const std::int64_t heads = which == kQ ? of.heads : of.heads_kv;
    const std::int64_t tiles = sequences * heads * (which == kQ ? of.slots_q : of.slots_k);
    const bool raised = scale == ScaleKind::kChannel || (which == kV && scale == ScaleKind::kToken);
    const std::int64_t groups = raised ? of.batch * heads : 0;
    QuantizeWorkspace::Tensor& tensor = w.tensors[which];
    tensor.found = take(scale == ScaleKind::kHead     ? 2 * tiles
                        : scale == ScaleKind::kTensor ? 2 * kMaxQuantizeBlocks
                                                      : 0);
    tensor.measured = take(groups);
    tensor.infinite = take(groups);
    tensor.amax = take(scale == ScaleKind::kChannel ? groups * of.head_dim_v : groups);
  }
  w.zero_words = end;
  w.k_partial = take(of.smooth_k ? sequences * of.heads_kv * of.slots_k * of.head_dim : 0);
  w.words = end;
  return w;
}

}  // namespace hopper_attention
