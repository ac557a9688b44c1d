// An e4m3 consumer's state within a tile, and the steps that both of its loops are made of.
#pragma once

#include "forward/fp8_load.cuh"
#include "forward/fp8_softmax.cuh"
#include "forward/mma.cuh"

namespace hopper_attention {

// Which of its consumer's rows a row of this thread is: fragment_first_row, but by thread of the
// block. Written out: ptxas arranges the loop around it by the form of the division.
CUTE_DEVICE int row_in_consumer(int thread, int row) {
  return thread % kWarpgroupThreads / 32 * 16 + thread % 32 / 4 + 8 * row;
}

template <class Traits>
struct Fp8Consumer {
  using Storage = typename Traits::SharedStorage;
  using Element = typename Traits::Element;

  ForwardParams const& params;
  Storage& shared;
  Ring<Traits::kStages>& k_ring;
  Ring<Traits::kStages>& v_ring;
  Turns<Traits> turns;
  Turns<Traits, Traits::kConfig.exp_turns> exp_turns;
  Fp8Softmax<Traits>& softmax;
  TileSink<Traits> const& sink;
  int row;                           // this thread's first
  float row_factor[kRowsPerThread];  // Q's scale and the softmax's (or that of S before a cap)
  float key_scale;                   // of the keys of the next block, if they share one
  const float* key_scales;           // of this head, where keys share them; or null

  CUTE_DEVICE void wait_k() { shared.barriers.k_full[k_ring.stage].wait(k_ring.phase); }
  CUTE_DEVICE void wait_v() { shared.barriers.v_full[v_ring.stage].wait(v_ring.phase); }
  CUTE_DEVICE void release_k(bool always) {
    if (cute::elect_one_sync() && always) shared.barriers.k_empty[k_ring.stage].arrive();
    k_ring.advance();
  }
  CUTE_DEVICE void release_v() {
    arrive_warp(shared.barriers.v_empty[v_ring.stage]);
    v_ring.advance();
  }
  CUTE_DEVICE void skip(int count) {  // blocks that only other consumers need
    for (; count > 0; --count) {
      wait_k();
      turns.wait();
      turns.pass();
      exp_turns.wait();
      exp_turns.pass();
      release_k(true);
      wait_v();
      release_v();
    }
  }

  // Makes the multipliers of n_block, whose keys' scale was loaded a block ago, and loads the next
  // one's: while the scores are still being multiplied.
  CUTE_DEVICE void prepare(int n_block) {
    const bool transform = Traits::kMasked && params.transform_scores;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float product = row_factor[r] * key_scale;
      softmax.multiplier[r] = transform ? product : positive(product);
    }
    load_key_scale(n_block - 1);
  }
  CUTE_DEVICE void load_key_scale(int n_block) {
    if (key_scales == nullptr) return;
    const int first_key = max(n_block, 0) * Traits::kTileN;
    key_scale = load_scale(key_scales + (first_key >> params.scales.k_shift));
  }

  // The final scores of a block with masks, caps, or scales of single keys.
  template <class Scores>
  CUTE_DEVICE void finish_scores(Scores& rS, int n_block) {
    if constexpr (Traits::kMasked) {
      if (params.transform_scores) transform_block(rS, n_block);
    }
    mask_scores<!Traits::kMasked>(rS, params.mask, row, n_block, Traits::kTileN);
  }

  template <class Scores>
  CUTE_DEVICE void transform_block(Scores& rS, int n_block) {
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(rS))::value; ++i) {
      rS(i) *= softmax.multiplier[fragment_row(i)];
    }
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) softmax.multiplier[r] = params.scale_log2;
    const int first_key = n_block * Traits::kTileN;
    if (scales_each_key(params)) {
      const float* factors = hopper_attention::key_scales(params, sink.tile(shared.barriers));
      KeyFactors<Traits::kTileN>(factors + first_key, params.mask.seqlen_k - first_key)
          .scale_columns(rS);
    }
    if (params.cap == 0.0f) return;
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(rS))::value; ++i) {
      rS(i) = params.cap * precise_tanh(rS(i));
    }
  }

  // After the exponentials: the factors of V's tokens, which P takes and its sum does not.
  template <class Scores>
  CUTE_DEVICE void fold_token_factors(Scores& rS, int n_block) {
    if constexpr (Traits::kMasked) {
      if (params.scales.v_token_factor == nullptr) return;
      if constexpr (Traits::kTokenSums) add_row_sums(rS);  // the ones would sum the products
      const int first_key = n_block * Traits::kTileN;
      const float* factors = token_factors(params, sink.tile(shared.barriers));
      KeyFactors<Traits::kTileN>(factors + first_key, params.mask.seqlen_k - first_key)
          .scale_columns(rS);
    }
  }

  // In shared memory, for which the registers do not last.
  CUTE_DEVICE void clear_row_sums() {
    if (params.scales.v_token_factor == nullptr) return;
    for (int r = 0; r < kRowsPerThread; ++r) {
      shared.row_sums[turns.consumer][row_in_consumer(threadIdx.x, r)] = 0.0f;
    }
    __syncwarp();
  }
  template <class Scores>
  CUTE_DEVICE void add_row_sums(Scores const& rP) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      float part = 0.0f;
      CUTE_UNROLL
      for (int j = 0; j < decltype(cute::size(rP))::value / kRowsPerThread; ++j) {
        part += rP(fragment_index(r, j));
      }
      const float block_sum = quad_reduce(part, [](float a, float b) { return a + b; });
      const int thread = fresh_thread();
      float& sum = shared.row_sums[thread / kWarpgroupThreads - 1][row_in_consumer(thread, r)];
      if (thread % 4 == 0) sum = fmaf(sum, softmax.alpha[r], block_sum);
    }
    __syncwarp();
  }

  // O of the last block that was folded in becomes O in the reference of the next. t may have more
  // columns than o.
  template <class Output, class Block>
  CUTE_DEVICE static void fold(Output&& o, Block const& t, float const (&alpha)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(o))::value; ++i) {
      o(i) = fmaf(o(i), alpha[fragment_row(i)], t(i));
    }
  }
};

template <class Traits>
CUTE_DEVICE auto make_p_fragment() {
  using namespace cute;
  // A thread's 4 neighbours of K, two rows, and the same 16 further on; for every 32 keys.
  return make_tensor<typename Traits::Element>(
      Layout<Shape<Shape<_4, _2, _2>, _1, Int<Traits::kTileN / 32>>>{});
}

// step(n_block, kPlain) for a consumer's blocks from n_block on, right to left.
template <class Traits, class Step>
CUTE_DEVICE void for_blocks(BlockRange own, BlockRange plain, int n_block, Step const& step) {
  using cute::false_type;
  using cute::true_type;
  if constexpr (Traits::kMasked) {
    const int plain_begin = max(plain.begin, own.begin);
    while (n_block >= own.begin) {  // right edge, middle, left edge: at most twice
      for (; n_block >= own.begin && (n_block >= plain.end || n_block < plain.begin); --n_block) {
        step(n_block, false_type{});
      }
      for (; n_block >= plain_begin && n_block < plain.end; --n_block) step(n_block, true_type{});
    }
  } else {
    if constexpr (!Traits::kConfig.overlap_products) {
      if (n_block >= plain.end) step(n_block--, false_type{});  // a short last block
    }
    for (; n_block >= own.begin; --n_block) step(n_block, true_type{});
  }
}

}  // namespace hopper_attention
