// What a consumer computes on its fragments between the products, and how it goes through the
// query blocks.
//
// With S = scale Q K^T, P = exp(S - LSE), delta = rowsum(dO * O) - dLSE:
//   dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q
// (Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2). The scale of dQ and dK is left to the
// kernels that round them.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "backward/mask.cuh"
#include "backward/traits.cuh"
#include "common/wgmma.cuh"

namespace hopper_attention {

// Named barriers of the consumers.
enum class BackwardBarrier : std::uint32_t {
  kAll = 0,       // all consumers
  kConsumer = 1,  // 1 to 3: consumer i's threads
  kAdded = 4,     // 4 to 6: consumer i's dQ of a step is added; its turn's keeper waits
};

CUTE_DEVICE void sync_consumers(int num_consumers) {
  cutlass::arch::NamedBarrier::sync(num_consumers * kWarpgroupThreads,
                                    static_cast<std::uint32_t>(BackwardBarrier::kAll));
}
CUTE_DEVICE void sync_consumer(int consumer) {
  cutlass::arch::NamedBarrier::sync(
      kWarpgroupThreads, static_cast<std::uint32_t>(BackwardBarrier::kConsumer) + consumer);
}

template <class Element, class Source, class Target>
CUTE_DEVICE void convert_fragment(Source const& from, Target& to) {
  constexpr int kSize = decltype(cute::size(from))::value;
  cutlass::NumericArrayConverter<Element, float, kSize> convert;
  *reinterpret_cast<cutlass::Array<Element, kSize>*>(to.data()) =
      convert(*reinterpret_cast<const cutlass::Array<float, kSize>*>(from.data()));
}

// The two numbers of a row statistic that a thread needs for elements 4 j and on of its part of
// S^T: those of columns 8 j + 2 * (lane % 4) and the next.
CUTE_DEVICE float2 column_pair(float const* statistic, int j) {
  return *reinterpret_cast<float2 const*>(statistic + 8 * j + threadIdx.x % 4 * 2);
}

// S^T -> P^T = exp2(scale_log2 * S - LSE_log2), in place.
template <class Traits, class Scores>
CUTE_DEVICE void exponentiate(BackwardParams const& params, float const* lse_log2, Scores& s) {
  constexpr int kSize = decltype(cute::size(s))::value;
  float scale = params.scale_log2;
  if constexpr (Traits::kCapped) {
    CUTE_UNROLL
    for (int i = 0; i < kSize; ++i) {
      s(i) = params.cap_log2 * precise_tanh(s(i) * params.inner_scale);
    }
    scale = 1.0f;
  }
  CUTE_UNROLL
  for (int i = 0; i < kSize; i += 4) {
    const float2 lse = column_pair(lse_log2, i / 4);
    s(i) = exp2f(fmaf(s(i), scale, -lse.x));
    s(i + 1) = exp2f(fmaf(s(i + 1), scale, -lse.y));
    s(i + 2) = exp2f(fmaf(s(i + 2), scale, -lse.x));
    s(i + 3) = exp2f(fmaf(s(i + 3), scale, -lse.y));
  }
}

// P where a key is not seen. first_key: this thread's first.
template <class Traits, class Scores>
CUTE_DEVICE void mask_scores(Mask const& mask, int first_key, int m_block, Scores& p) {
  const SeenColumns seen = seen_columns<!Traits::kMasked>(mask, first_key, m_block, Traits::kTileM);
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(p))::value; ++i) {
    if (!is_seen(seen, i)) p(i) = 0.0f;
  }
}

template <class Operand>
CUTE_DEVICE void round_pair(Operand& to, int i, float x, float y) {
  using Element = typename Operand::value_type;
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  cutlass::Array<float, 2> pair;
  pair[0] = x, pair[1] = y;
  reinterpret_cast<cutlass::Array<Element, 2>*>(to.data())[i / 2] = convert(pair);
}

// One number of dS = P * (dP - delta).
CUTE_DEVICE float ds_of(float p, float dp, float delta) { return p * (dp - delta); }

// Under a soft cap times its factor, 1 - tanh^2. tanh comes back out of P, whose logarithm is the
// capped score less LSE: keeping it instead would take as many registers as S. Where P is 0 so is
// dS.
CUTE_DEVICE float capped_ds_of(BackwardParams const& params, float p, float dp, float delta,
                               float lse_log2) {
  const float t = (log2f(p) + lse_log2) / params.cap_log2;
  return p > 0.0f ? ds_of(p, dp, delta) * fmaf(-t, t, 1.0f) : 0.0f;
}

// Elements i to i + 3 of dS in 16 bits. delta and lse_log2: the step's.
template <class Traits, class Scores, class Operand>
CUTE_DEVICE void round_ds(BackwardParams const& params, float const* delta, float const* lse_log2,
                          float4 p, Scores const& dp, int i, Operand& ds16) {
  const float2 d = column_pair(delta, i / 4);
  if constexpr (Traits::kCapped) {
    const float2 lse = column_pair(lse_log2, i / 4);
    round_pair(ds16, i, capped_ds_of(params, p.x, dp(i), d.x, lse.x),
               capped_ds_of(params, p.y, dp(i + 1), d.y, lse.y));
    round_pair(ds16, i + 2, capped_ds_of(params, p.z, dp(i + 2), d.x, lse.x),
               capped_ds_of(params, p.w, dp(i + 3), d.y, lse.y));
  } else {
    round_pair(ds16, i, ds_of(p.x, dp(i), d.x), ds_of(p.y, dp(i + 1), d.y));
    round_pair(ds16, i + 2, ds_of(p.z, dp(i + 2), d.x), ds_of(p.w, dp(i + 3), d.y));
  }
}

// P and dS in 16 bits. A few numbers at a time: as a whole it takes more registers than there are.
template <class Traits, class Scores, class Operand>
CUTE_DEVICE void differentiate(BackwardParams const& params, float const* delta,
                               float const* lse_log2, Scores const& p, Scores const& dp,
                               Operand& p16, Operand& ds16) {
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(p))::value; i += 4) {
    round_pair(p16, i, p(i), p(i + 1));
    round_pair(p16, i + 2, p(i + 2), p(i + 3));
    const float4 four = make_float4(p(i), p(i + 1), p(i + 2), p(i + 3));
    round_ds<Traits>(params, delta, lse_log2, four, dp, i, ds16);
  }
}

// Zeros, right before the loop. A plain zero is hoisted by ptxas ahead of setmaxnreg, where the
// upper registers do not exist yet, and the gradients are then kept in local memory.
template <class... Gradients>
CUTE_DEVICE void start_gradients(Gradients&... gradients) {
  const float zero = __shfl_sync(0xffffffff, 0.0f, 0);
  (cute::fill(gradients, zero), ...);
}

// A key block's steps: all query blocks that see it, of one query head of the group after the
// other.
struct QuerySteps {
  BlockRange blocks;
  int m_block;
  int heads_left;
  int heads_apart;     // blocks of the workspace from one head's last step to the next one's first
  std::int64_t block;  // of the workspace

  CUTE_DEVICE QuerySteps(BackwardParams const& params, KeyTile const& tile)
      : blocks(tile.m_blocks),
        m_block(tile.m_blocks.begin),
        heads_left(tile.m_blocks.empty() ? 0 : params.heads_per_kv),
        heads_apart(params.num_m_blocks - (tile.m_blocks.end - tile.m_blocks.begin)),
        block(workspace_block(params, tile.batch, tile.head_kv * params.heads_per_kv,
                              tile.first_block + tile.m_blocks.begin)) {}

  CUTE_DEVICE bool done() const { return heads_left == 0; }
  CUTE_DEVICE bool last() const { return heads_left == 1 && m_block + 1 == blocks.end; }
  CUTE_DEVICE void advance() {
    ++block;
    if (++m_block < blocks.end) return;
    m_block = blocks.begin;
    block += heads_apart;
    --heads_left;
  }
};

// Query blocks of which every row sees every key of the block, so that P needs no mask.
template <class Traits>
CUTE_DEVICE BlockRange plain_steps(Mask const& mask, KeyTile const& tile) {
  const int begin = tile.n_block * Traits::kTileN, end = begin + Traits::kTileN;
  if (end > mask.seqlen_k) return {0, 0};
  return Traits::kMasked ? plain_query_blocks(mask, begin, end, Traits::kTileM) : tile.m_blocks;
}

// Calls step(true_type) for the steps whose P needs no mask, step(false_type) for the others, and
// advances `at` after each. Two copies of the step in loops of their own: with a branch inside of
// one loop ptxas overlays the gradients' registers with those of S and dP, and spills 350 bytes.
template <class Traits, class Step>
CUTE_DEVICE void for_each_step(QuerySteps& at, BlockRange plain, Step step) {
  if constexpr (Traits::kCapped) {  // tanh is slow anyhow
    for (; !at.done(); at.advance()) step(cute::false_type{});
  } else {
    auto is_plain = [&] { return at.m_block >= plain.begin && at.m_block < plain.end; };
    while (!at.done()) {
      for (; !at.done() && !is_plain(); at.advance()) step(cute::false_type{});
      for (; !at.done() && is_plain(); at.advance()) step(cute::true_type{});
    }
  }
}

}  // namespace hopper_attention
