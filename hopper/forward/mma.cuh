// The consumer: S = Q K^T, P = softmax(S), O += P V over a tile's key blocks, right to left.
//
// Within a consumer, the next block's Q K^T is issued ahead of this block's P V, and the next
// block's softmax runs while that P V is still on the tensor cores. Between consumers, turns (named
// barriers) let one's products run under the other's softmax.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "common/wgmma.cuh"
#include "forward/load.cuh"
#include "forward/mask.cuh"
#include "forward/traits.cuh"

namespace hopper_attention {

// Turns are passed round robin; consumer 0 starts.
template <class Traits, bool kTake = Traits::kConfig.ping_pong>
struct Turns {
  static constexpr int kThreads = 2 * kWarpgroupThreads;  // one waits, one passes
  int consumer;

  CUTE_DEVICE void start() const {
    if constexpr (kTake) {
      if (consumer == 0) arrive_named(NamedBarrier::kTurn, 0, kThreads);
    }
  }
  CUTE_DEVICE void wait() const {
    if constexpr (kTake) sync_named(NamedBarrier::kTurn, consumer, kThreads);
  }
  CUTE_DEVICE void pass() const {
    if constexpr (kTake) {
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

// Of a tile's blocks, those that rows first_row and on of one consumer see.
template <class Traits>
CUTE_DEVICE BlockRange own_blocks(Mask const& mask, BlockRange blocks, int first_row) {
  if constexpr (!consumers_differ(Traits::kConfig)) return blocks;
  BlockRange own = blocks;
  if constexpr (Traits::kMasked) {
    const int row_end = min(first_row + kConsumerRows, mask.seqlen_q);
    own = key_blocks(mask, first_row, row_end, Traits::kTileN);
  }
  return first_row < mask.seqlen_q && !own.empty() ? own : BlockRange{blocks.begin, blocks.begin};
}

// A consumer's scores of a block.
template <class Traits>
CUTE_DEVICE auto make_scores() {
  return cute::partition_fragment_C(typename Traits::MmaQK{},
                                    cute::Shape<typename Traits::M, typename Traits::N>{});
}

// O of one consumer's rows of one tile, not yet divided by the row sums, and their statistics.
// thread: 0 to 127 within the consumer. rings: this consumer's place in the stages. meanwhile() is
// called when the softmax is complete, under the last P V where there is one. With ahead_first the
// tensor cores are at the first block's scores already, and meanwhile() has them begin those of the
// next tile's, in the same registers.
template <class Traits, class Output, class FirstScores, class Meanwhile>
CUTE_DEVICE void attend(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        TileSink<Traits> const& sink, Mask const& mask, BlockRange blocks,
                        int first_row, int consumer, int thread, Ring<Traits::kStages>& k_ring,
                        Ring<Traits::kStages>& v_ring, QRing<Traits> q_ring, Softmax& softmax,
                        Output& rO, FirstScores& first_scores, Meanwhile const& meanwhile) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto& barriers = shared.barriers;
  const Turns<Traits> turns{consumer};
  constexpr bool kAhead = Traits::kConfig.ahead_first;
  const int q_buffer = q_index<Traits>(q_ring, consumer);
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  Tensor sQ = make_tensor(make_smem_ptr(shared.q[q_buffer]), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), typename Traits::LayoutVt{});
  auto thread_qk = mma_qk.get_thread_slice(0);  // descriptors are the same for every thread
  auto thread_pv = mma_pv.get_thread_slice(0);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);   // (MMA, 1, d/16)
  Tensor tSrK = thread_qk.partition_fragment_B(sK);   // (MMA, 1, d/16, stages)
  Tensor tOrV = thread_pv.partition_fragment_B(sVt);  // (MMA, 1, tile_n/16, stages)
  auto&& rS = [&]() -> decltype(auto) {
    if constexpr (kAhead)
      return (first_scores);
    else
      return make_scores<Traits>();
  }();
  // P as the second product's A operand has S's elements in S's order.
  Tensor rP =
      make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Traits::kTileN / 16>>>{});

  // The tile's blocks are those of all consumers; this one's rows may see fewer, or lie past the
  // end.
  const BlockRange own = own_blocks<Traits>(mask, blocks, first_row);
  const int row = fragment_first_row(thread, first_row);  // this thread's first
  const int row_end = min(first_row + kConsumerRows, mask.seqlen_q);
  const BlockRange plain = Traits::kMasked && params.transform_scores
                               ? BlockRange{0, 0}
                               : plain_blocks(mask, first_row, row_end, Traits::kTileN);

  auto wait_k = [&] { barriers.k_full[k_ring.stage].wait(k_ring.phase); };
  constexpr bool kFreeFirst = Traits::kConfig.free_first;
  auto score = [&] {
    turns.wait();
    issue_product<true>(mma_qk, tSrQ, tSrK(_, _, _, k_ring.stage), rS);
  };
  auto release_k = [&](bool always) {
    if (elect_one_sync() && always) barriers.k_empty[k_ring.stage].arrive();
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
  auto skip = [&](int n_block, int begin) {  // blocks that only other consumers need, down to begin
    for (; n_block >= begin; --n_block) {
      wait_k();
      if (!kFreeFirst || takes_turn(blocks, own, n_block)) {
        turns.wait();
        turns.pass();
      }
      release_k(true);
      barriers.v_full[v_ring.stage].wait(v_ring.phase);
      release_v();
    }
  };
  auto release_q = [&] { arrive_warp(barriers.q_empty[q_buffer]); };
  auto prepare_scores = [&](auto& s, int n_block) {
    if constexpr (Traits::kMasked) {
      if (params.transform_scores) transform_scores(s, params);
    }
    constexpr bool kByBits = Traits::kConfig.mask_by_bits;
    if constexpr (Traits::kPacked) {  // the mask of this sequence, anew: registers are short
      mask_scores<false, kByBits>(s, sink.mask(params, barriers), row, n_block, Traits::kTileN);
    } else {
      mask_scores<!Traits::kMasked, kByBits>(s, params.mask, row, n_block, Traits::kTileN);
    }
  };
  constexpr Schedule kSchedule = Traits::kConfig.schedule;
  constexpr bool kAlphaFirst = Traits::kConfig.alpha_first;
  constexpr bool kHoldsByRelease = kSchedule != Schedule::kAfterMaxima;
  auto rescale = [&] {
    if (!Traits::kConfig.skip_rescale || softmax.owes_rescale()) softmax.rescale(rO);
  };
  // One block: its scores, while the products of the block to its right run. kPlain: no score of it
  // is masked or transformed, as holds for all but a few; a body of its own spares it the branches.
  auto step = [&](int n_block, auto kPlain) {
    wait_k();
    score();
    if constexpr (Traits::kConfig.late_rescale) rescale();
    add_values();
    turns.pass();
    warpgroup_wait<1>();  // the scores; the values are still being multiplied
    warpgroup_fence_operand(rS);
    if constexpr (!kHoldsByRelease) release_k(true);
    if constexpr (!kPlain) prepare_scores(rS, n_block);
    // A warp gets 4 exponentials a cycle; the maxima, the rescale of O and the conversion of P fill
    // the gaps. Left alone, ptxas moves the wait for P V up to the last arrival, shuffle or branch
    // before it, and softmax and P V run one after the other. The schedules below put one of these
    // where the wait shall be, on a condition that always holds (a sum of exponentials is not
    // negative) but needs the exponentials before it.
    constexpr bool kMayBeEmpty = Traits::kMasked && !kPlain;
    softmax.template take_maximum<kMayBeEmpty>(
        softmax.template thread_max<kAlphaFirst ? 2 : 1>(rS, 0), 0);
    if constexpr (kHoldsByRelease) {
      constexpr int kColumns = Traits::kTileN / 4;  // a thread's of a row
      constexpr int kLast = kSchedule == Schedule::kAfterRow ? kColumns - 1 : kColumns / 2;
      const float sum_before = softmax.sum[0];
      if constexpr (kSchedule == Schedule::kRowByRow) {
        softmax.template exponentiate<kAlphaFirst>(rS, 0);
        // -inf, by way of an exponential: else ptxas takes both maxima ahead of them all.
        const float seed = fmaf(rS(fragment_index(0, 0)), 0.0f, -INFINITY);
        softmax.template take_maximum<kMayBeEmpty>(softmax.thread_max(rS, 1, seed), 1);
      } else {
        softmax.template take_maximum<kMayBeEmpty>(softmax.thread_max(rS, 1), 1);
        softmax.template exponentiate<kAlphaFirst>(rS, 0);
      }
      release_k(!(sum_before + rS(fragment_index(0, kLast)) < 0.0f));
    } else {
      softmax.template exponentiate<kAlphaFirst>(rS, 0);
      softmax.template take_maximum<kMayBeEmpty>(softmax.thread_max(rS, 1), 1);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(rO);
    release_v();
    softmax.template exponentiate<kAlphaFirst>(rS, 1);
    if constexpr (!Traits::kConfig.late_rescale) rescale();
    convert_probabilities<Element>(rS, rP);
  };

  if constexpr (!kAhead) barriers.q_full[q_buffer].wait(q_ring.phase);
  clear(rO);
  if constexpr (Traits::kPacked && !consumers_differ(Traits::kConfig)) {
    // Of short sequences the second consumer often has no row. Here rather than in own_blocks,
    // whose range would then be one more to hold.
    if (first_row >= mask.seqlen_q) {
      if constexpr (kAhead) warpgroup_wait<0>();
      skip(blocks.end - 1, blocks.begin);
      release_q();
      meanwhile();
      return;
    }
  }
  if constexpr (!kAhead) {
    skip(blocks.end - 1, own.end);  // all of them where own is empty: it ends where blocks begins
    if (own.empty()) {
      release_q();
      meanwhile();
      return;
    }
    wait_k();
  }
  // The first block, of which s has the scores of all keys or of the first that k holds.
  auto begin = [&](auto& mma, auto const& k, auto& s) {
    if constexpr (!kAhead) {
      if constexpr (!kFreeFirst) turns.wait();
      issue_product<true>(mma, tSrQ, k(_, _, _, k_ring.stage), s);
      if constexpr (!kFreeFirst) turns.pass();
    }
    warpgroup_wait<0>();
    if constexpr (kAhead) warpgroup_fence_operand(s);
    release_k(true);
    if (own.end > plain.end) prepare_scores(s, own.end - 1);
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {  // O is still zero
      softmax.template take_maximum<Traits::kMasked>(softmax.thread_max(s, r), r);
      softmax.template exponentiate<kAlphaFirst>(s, r);
    }
    convert_probabilities<Element>(s, rP);
    CUTE_UNROLL
    for (int i = size(s); i < size(rP); ++i) rP(i) = Element(0.0f);
  };
  if constexpr (Traits::kConfig.narrow_first) {
    if (ends_within(mask, row_end, own.end - 1, Traits::kTileN, kNarrowKeys)) {
      typename Traits::MmaNarrow mma_narrow;
      using Keys = typename Traits::NarrowN;
      Tensor sNarrow =
          local_tile(sK, make_tile(Keys{}, typename Traits::D{}), make_coord(_0{}, _0{}));
      Tensor tSrNarrow = mma_narrow.get_thread_slice(0).partition_fragment_B(sNarrow);
      auto layout = partition_fragment_C(mma_narrow, Shape<typename Traits::M, Keys>{}).layout();
      Tensor rNarrow = make_tensor(rS.data(), layout);  // the same registers
      begin(mma_narrow, tSrNarrow, rNarrow);
    } else {
      begin(mma_qk, tSrK, rS);
    }
  } else {
    begin(mma_qk, tSrK, rS);
  }

  int n_block = own.end - 2;
  if constexpr (Traits::kMasked) {
    const int plain_begin = max(plain.begin, own.begin);
    while (n_block >= own.begin) {  // right edge, middle, left edge: at most twice
      for (; n_block >= own.begin && (n_block >= plain.end || n_block < plain.begin); --n_block) {
        step(n_block, false_type{});
      }
      for (; n_block >= plain_begin && n_block < plain.end; --n_block) step(n_block, true_type{});
    }
  } else {
    for (; n_block >= own.begin; --n_block) step(n_block, true_type{});
  }

  release_q();
  if constexpr (Traits::kConfig.late_rescale) rescale();
  add_values();
  meanwhile();
  warpgroup_wait<kAhead ? 1 : 0>();
  warpgroup_fence_operand(rO);
  release_v();
  if constexpr (!kAhead) skip(own.begin - 1, blocks.begin);
}

}  // namespace hopper_attention
