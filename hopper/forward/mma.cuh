// The consumer: S = Q K^T, P = softmax(S), O += P V over a tile's key blocks, right to left.
//
// Within a consumer, the next block's Q K^T is issued ahead of this block's P V, and the next block's
// softmax runs while that P V is still on the tensor cores. Between consumers, turns (named barriers)
// let one's products run under the other's softmax.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "common/wgmma.cuh"
#include "forward/load.cuh"
#include "forward/mask.cuh"
#include "forward/traits.cuh"

namespace hopper_attention {

// Turns are passed round robin; consumer 0 starts.
template <class Traits>
struct Turns {
  static constexpr int kThreads = 2 * kWarpgroupThreads;  // one waits, one passes
  int consumer;

  CUTE_DEVICE void start() const {
    if constexpr (Traits::kConfig.ping_pong) {
      if (consumer == 0) arrive_named(NamedBarrier::kTurn, 0, kThreads);
    }
  }
  CUTE_DEVICE void wait() const {
    if constexpr (Traits::kConfig.ping_pong) sync_named(NamedBarrier::kTurn, consumer, kThreads);
  }
  CUTE_DEVICE void pass() const {
    if constexpr (Traits::kConfig.ping_pong) {
      const int next = consumer + 1 == Traits::kConsumers ? 0 : consumer + 1;
      arrive_named(NamedBarrier::kTurn, next, kThreads);
    }
  }
};

template <class Element, class Scores, class Probabilities>
CUTE_DEVICE void convert_probabilities(Scores const& s, Probabilities& p) {
  constexpr int kSize = decltype(cute::size(s))::value;
  cutlass::NumericArrayConverter<Element, float, kSize> convert;
  *reinterpret_cast<cutlass::Array<Element, kSize>*>(p.data()) =
      convert(*reinterpret_cast<const cutlass::Array<float, kSize>*>(s.data()));
}

// O of one consumer's rows of one tile, not yet divided by the row sums, and their statistics.
// thread: 0 to 127 within the consumer. ring: this consumer's place in K's and V's stages.
template <class Traits, class Output>
CUTE_DEVICE void attend(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        BlockRange blocks, int first_row, int consumer, int thread,
                        Ring<Traits::kStages>& k_ring, Ring<Traits::kStages>& v_ring,
                        std::uint32_t q_phase, Softmax& softmax, Output& rO) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto& barriers = shared.barriers;
  const Turns<Traits> turns{consumer};
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  Tensor sQ = make_tensor(make_smem_ptr(shared.q[consumer]), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), typename Traits::LayoutVt{});
  auto thread_qk = mma_qk.get_thread_slice(0);  // descriptors are the same for every thread
  auto thread_pv = mma_pv.get_thread_slice(0);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);  // (MMA, 1, d/16)
  Tensor tSrK = thread_qk.partition_fragment_B(sK);  // (MMA, 1, d/16, stages)
  Tensor tOrV = thread_pv.partition_fragment_B(sVt);  // (MMA, 1, tile_n/16, stages)
  Tensor rS = partition_fragment_C(mma_qk, Shape<typename Traits::M, typename Traits::N>{});
  // P as the second product's A operand has S's elements in S's order.
  Tensor rP = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Traits::kTileN / 16>>>{});

  const int row = first_row + thread / 32 * 16 + thread % 32 / 4;  // this thread's first
  const int row_end = min(first_row + kConsumerRows, params.mask.seqlen_q);
  const BlockRange plain = Traits::kMasked && params.transform_scores
                               ? BlockRange{0, 0}
                               : plain_blocks(params.mask, first_row, row_end, Traits::kTileN);

  auto wait_k = [&] { barriers.k_full[k_ring.stage].wait(k_ring.phase); };
  auto score = [&] {
    turns.wait();
    issue_product<true>(mma_qk, tSrQ, tSrK(_, _, _, k_ring.stage), rS);
  };
  auto release_k = [&] {
    arrive_warp(barriers.k_empty[k_ring.stage]);
    k_ring.advance();
  };
  auto add_values = [&] {
    barriers.v_full[v_ring.stage].wait(v_ring.phase);
    issue_product<false>(mma_pv, rP, tOrV(_, _, _, v_ring.stage), rO);
  };
  auto release_v = [&] {
    arrive_warp(barriers.v_empty[v_ring.stage]);
    v_ring.advance();
  };
  auto prepare_scores = [&](int n_block) {
    if constexpr (Traits::kMasked) {
      if (params.transform_scores) transform_scores(rS, params);
    }
    mask_scores<!Traits::kMasked>(rS, params.mask, row, n_block, Traits::kTileN);
  };
  constexpr bool kHoldWait = Traits::kConfig.schedule == Schedule::kSplitRows;
  // One block: its scores, while the products of the block to its right run. kPlain: no score of it
  // is masked or transformed, as holds for all but a few; a body of its own spares it the branches.
  auto step = [&](int n_block, auto kPlain) {
    if constexpr (!kHoldWait) wait_k();
    score();
    add_values();
    turns.pass();
    warpgroup_wait<1>();  // the scores; the values are still being multiplied
    warpgroup_fence_operand(rS);
    release_k();
    if constexpr (!kPlain) prepare_scores(n_block);
    // A warp gets 4 exponentials a cycle; the maxima, the rescale of O and the conversion of P fill
    // the gaps.
    constexpr bool kMayBeEmpty = Traits::kMasked && !kPlain;
    softmax.template take_maximum<kMayBeEmpty>(softmax.thread_max(rS, 0), 0);
    softmax.exponentiate(rS, 0);
    const float part = softmax.thread_max(rS, 1);
    // Left alone, ptxas moves the wait for P V up to the maxima. Where the schedule says so, waiting
    // for the next K on a condition that needs the first row's exponentials (no sum is negative)
    // holds them above that wait, and the second row's shuffles below it.
    if constexpr (kHoldWait) {
      const bool more = n_block > blocks.begin;
      if (more && !(softmax.sum[0] < 0.0f)) wait_k();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(rO);
    release_v();
    softmax.template take_maximum<kMayBeEmpty>(part, 1);
    softmax.exponentiate(rS, 1);
    if (!Traits::kConfig.skip_rescale || softmax.owes_rescale()) softmax.rescale(rO);
    convert_probabilities<Element>(rS, rP);
  };

  barriers.q_full[consumer].wait(q_phase);
  clear(rO);
  wait_k();
  score();
  turns.pass();
  warpgroup_wait<0>();
  release_k();
  if (blocks.end > plain.end) prepare_scores(blocks.end - 1);
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {  // O is still zero
    softmax.template take_maximum<Traits::kMasked>(softmax.thread_max(rS, r), r);
    softmax.exponentiate(rS, r);
  }
  convert_probabilities<Element>(rS, rP);
  if (kHoldWait && blocks.end - 1 > blocks.begin) wait_k();

  for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
    if (!Traits::kMasked || (n_block >= plain.begin && n_block < plain.end)) {
      step(n_block, true_type{});
    } else {
      step(n_block, false_type{});
    }
  }

  if constexpr (!Traits::kOverlayO) arrive_warp(barriers.q_empty[consumer]);
  add_values();
  warpgroup_wait<0>();
  warpgroup_fence_operand(rO);
  release_v();
}

}  // namespace hopper_attention
