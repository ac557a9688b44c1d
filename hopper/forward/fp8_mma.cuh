// The consumer in e4m3: S = Q K^T, P = softmax(S), O += P V over a tile's key blocks, right to
// left.
//
// Hopper's FP8 products keep about 14 bits of their accumulator, too few to add thousands of keys.
// So each block's P V has an accumulator T of its own, which O = alpha O + T takes in in float32,
// with the multiplication that online softmax needs anyway. Where registers for T last beside the
// next block's S, the next Q K^T is issued ahead of P V as in 16 bits (attend_overlapped); else P V
// is computed in parts of head_dim_v, two at a time in the registers that S had, each folded in
// under the next one's product (attend_in_parts).
#pragma once

#include "forward/fp8_consumer.cuh"

namespace hopper_attention {

// The scores of the first block and its P; O is still zero.
template <class Traits, class Scores, class Probabilities>
CUTE_DEVICE void first_softmax(Fp8Consumer<Traits>& self, Scores& rS, Probabilities& rP,
                               BlockRange own, BlockRange plain) {
  const int n_block = own.end - 1;
  const bool masked = own.end > plain.end;
  self.prepare(n_block);
  if (masked) self.finish_scores(rS, n_block);
  self.exp_turns.wait();
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    self.softmax.template take_maximum<Traits::kMasked>(Softmax::thread_max(rS, r), r);
    self.softmax.exponentiate(rS, r);
  }
  self.exp_turns.pass();
  if (masked) self.fold_token_factors(rS, n_block);
  convert_to_e4m3(rS, rP);
}

template <class Traits, class Output, class ReleaseQ>
CUTE_DEVICE void attend_overlapped(Fp8Consumer<Traits>& self, int consumer, BlockRange own,
                                   BlockRange plain, Output& rO, ReleaseQ const& release_q) {
  using namespace cute;
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  Tensor sQ = make_tensor(make_smem_ptr(self.shared.q[consumer]), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(self.shared.k[0]), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(self.shared.v[0]), typename Traits::LayoutVt{});
  auto thread_qk = mma_qk.get_thread_slice(0);  // descriptors are the same for every thread
  auto thread_pv = mma_pv.get_thread_slice(0);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);   // (MMA, 1, d/32)
  Tensor tSrK = thread_qk.partition_fragment_B(sK);   // (MMA, 1, d/32, stages)
  Tensor tOrV = thread_pv.partition_fragment_B(sVt);  // (MMA, 1, tile_n/32, stages)
  auto make_s = [&] {
    return partition_fragment_C(mma_qk, Shape<typename Traits::M, typename Traits::N>{});
  };
  auto rP = make_p_fragment<Traits>();
  Fp8Softmax<Traits>& softmax = self.softmax;
  float owed[kRowsPerThread];  // alpha of the block in T

  auto score = [&](auto& rS) {
    self.turns.wait();
    issue_product<true>(mma_qk, tSrQ, tSrK(_, _, _, self.k_ring.stage), rS);
  };
  // rT: a block's P V; not used where O is its own accumulator.
  auto multiply_values = [&](auto& rT) {
    self.wait_v();
    if constexpr (Traits::kFast) {
      issue_product<false>(mma_pv, rP, tOrV(_, _, _, self.v_ring.stage), rO);
    } else {
      issue_product<true>(mma_pv, rP, tOrV(_, _, _, self.v_ring.stage), rT);
    }
  };
  auto take_values = [&](auto& rT) {
    warpgroup_wait<0>();
    warpgroup_fence_operand(rO);
    if constexpr (!Traits::kFast) warpgroup_fence_operand(rT);
    self.release_v();
    if constexpr (!Traits::kFast) Fp8Consumer<Traits>::fold(rO, rT, owed);
  };
  constexpr bool kHalf = Traits::kConfig.schedule == Schedule::kAfterHalfRow;
  constexpr bool kHolds = kHalf || Traits::kConfig.schedule == Schedule::kAfterRow;
  // S and T begin anew in each step: a fragment that lived on would hold its registers.
  auto step = [&](int n_block, auto kPlain) {
    auto rS = make_s();
    Tensor rT = make_fragment_like(rO);
    self.wait_k();
    score(rS);
    multiply_values(rT);
    self.turns.pass();
    self.prepare(n_block);
    warpgroup_wait<1>();  // the scores; the values are still being multiplied
    warpgroup_fence_operand(rS);
    if constexpr (!kHolds) self.release_k(true);
    if constexpr (!kPlain) self.finish_scores(rS, n_block);
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) owed[r] = softmax.alpha[r];
    softmax.template take_maxima<kPlain>(rS);
    self.exp_turns.wait();
    softmax.exponentiate(rS, 0);
    if constexpr (kHolds) {  // holds the wait below back, as in mma.cuh; P is never negative
      constexpr int kColumns = Traits::kTileN / 4;
      const float p = rS(fragment_index(0, kHalf ? kColumns / 2 : kColumns - 1));
      self.release_k(!(opaque(p) < 0.0f));
    }
    take_values(rT);
    softmax.exponentiate(rS, 1);
    self.exp_turns.pass();
    if constexpr (!kPlain) self.fold_token_factors(rS, n_block);
    if constexpr (Traits::kFast) {
      CUTE_UNROLL
      for (int i = 0; i < decltype(size(rO))::value; ++i) rO(i) *= softmax.alpha[fragment_row(i)];
    }
    convert_to_e4m3(rS, rP);
  };

  {
    auto rS = make_s();
    self.wait_k();
    score(rS);
    self.turns.pass();
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);
    self.release_k(true);
    first_softmax(self, rS, rP, own, plain);
  }
  for_blocks<Traits>(own, plain, own.end - 2, step);
  release_q();
  Tensor rT = make_fragment_like(rO);
  multiply_values(rT);
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) owed[r] = softmax.alpha[r];
  take_values(rT);
}

template <class Traits, class Output, class ReleaseQ>
CUTE_DEVICE void attend_in_parts(Fp8Consumer<Traits>& self, int consumer, BlockRange own,
                                 BlockRange plain, Output& rO, ReleaseQ const& release_q) {
  using namespace cute;
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPart mma_part;
  typename Traits::MmaPV mma_last;
  constexpr int kLast = Traits::kParts - 1;
  Tensor sQ = make_tensor(make_smem_ptr(self.shared.q[consumer]), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(self.shared.k[0]), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(self.shared.v[0]), typename Traits::LayoutVt{});
  typename Traits::Element* last_channels =
      self.shared.v[0] + kLast * Traits::kPartColumns * Traits::kTileN;
  Tensor sLastVt = make_tensor(make_smem_ptr(last_channels), typename Traits::LayoutLastVt{});
  auto thread_qk = mma_qk.get_thread_slice(0);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);                      // (MMA, 1, d/32)
  Tensor tSrK = thread_qk.partition_fragment_B(sK);                      // (MMA, 1, d/32, stages)
  Tensor tOrV = mma_part.get_thread_slice(0).partition_fragment_B(sVt);  // (.., parts, .., stages)
  Tensor tOrLastV = mma_last.get_thread_slice(0).partition_fragment_B(sLastVt);  // (.., 1, .., ..)
  using M = typename Traits::M;
  auto rP = make_p_fragment<Traits>();
  Fp8Softmax<Traits>& softmax = self.softmax;

  // S and, when that is P, two parts of P V in turn have the same registers, anew in each block:
  // what lived on would hold them.
  constexpr int kOfLast = Traits::kLastColumns / 2, kOfPart = Traits::kPartColumns / 2;
  constexpr int kAccumulators = cute::max(kOfLast + kOfPart, Traits::kTileN / 2);
  auto accumulator_of = [](auto& accumulators, auto part) {
    constexpr int kBehind = kLast - part;
    using Columns = Int<kBehind == 0 ? Traits::kLastColumns : Traits::kPartColumns>;
    using Mma = typename Traits::template MmaPVOf<Columns::value>;
    return make_tensor(accumulators.data() + (kBehind % 2 == 0 ? 0 : kOfLast),
                       partition_fragment_C(Mma{}, Shape<M, Columns>{}).layout());
  };

  // P V part by part: one is folded in under the next one's product.
  auto multiply_values = [&](auto& accumulators) {
    self.wait_v();
    Tensor last = tOrLastV(_, _, _, self.v_ring.stage);
    if constexpr (Traits::kFast) {  // O is its own accumulator
      CUTE_UNROLL
      for (int i = 0; i < decltype(size(rO))::value; ++i) rO(i) *= softmax.alpha[fragment_row(i)];
      issue_product<false>(mma_last, rP, last, rO);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      self.release_v();
      return;
    }
    for_each(make_int_sequence<kLast + 1>{}, [&](auto part) {
      Tensor rT = accumulator_of(accumulators, part);
      if constexpr (part == kLast) {
        issue_product<true>(mma_last, rP, last, rT);
      } else {
        Tensor b = tOrV(_, Int<part>{}, _, self.v_ring.stage);  // (MMA, tile_n/32)
        auto layout = make_layout(get<0>(b.layout()), Layout<_1>{}, get<1>(b.layout()));
        issue_product<true>(mma_part, rP, make_tensor(b.data(), layout), rT);
      }
      if constexpr (part > 0) {
        warpgroup_wait<1>();
        Tensor rBefore = accumulator_of(accumulators, Int<part - 1>{});
        warpgroup_fence_operand(rBefore);
        self.fold(rO(_, _, Int<part - 1>{}), rBefore, softmax.alpha);
        warpgroup_fence_operand(rBefore);
      }
    });
    warpgroup_wait<0>();
    Tensor rLastT = accumulator_of(accumulators, Int<kLast>{});
    warpgroup_fence_operand(rLastT);
    self.release_v();
    self.fold(rO(_, _, Int<kLast>{}), rLastT, softmax.alpha);
    if constexpr (Traits::kOnes && !Traits::kSumsInO) {
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        const float block_sum = rLastT(Traits::kPartColumns / 2 + 2 * r);
        softmax.sum[r] = fmaf(softmax.sum[r], softmax.alpha[r], block_sum);
      }
    }
  };
  auto step = [&](int n_block, auto kPlain) {
    Tensor accumulators = make_tensor<float>(Int<kAccumulators>{});
    Tensor rS = make_tensor(accumulators.data(),
                            partition_fragment_C(mma_qk, Shape<M, typename Traits::N>{}).layout());
    self.wait_k();
    self.turns.wait();
    issue_product<true>(mma_qk, tSrQ, tSrK(_, _, _, self.k_ring.stage), rS);
    self.turns.pass();
    self.prepare(n_block);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);
    self.release_k(true);
    if (n_block == own.begin) release_q();
    if constexpr (!kPlain) self.finish_scores(rS, n_block);
    softmax.template take_maxima<kPlain>(rS);
    self.exp_turns.wait();
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) softmax.exponentiate(rS, r);
    self.exp_turns.pass();
    if constexpr (!kPlain) self.fold_token_factors(rS, n_block);
    convert_to_e4m3(rS, rP);
    multiply_values(accumulators);
  };
  for_blocks<Traits>(own, plain, own.end - 1, step);
}

// O of one consumer's rows of one tile with, where Traits::kOnes, the row sums behind it.
template <class Traits, class Output>
CUTE_DEVICE void attend(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        TileSink<Traits> const& sink, BlockRange blocks, int first_row,
                        int consumer, int thread, Ring<Traits::kStages>& k_ring,
                        Ring<Traits::kStages>& v_ring, std::uint32_t q_phase,
                        Fp8Softmax<Traits>& softmax, Output& rO) {
  const BlockRange own = own_blocks<Traits>(params.mask, blocks, first_row);
  const int row = fragment_first_row(thread, first_row);
  const int row_end = min(first_row + kConsumerRows, params.mask.seqlen_q);
  const BlockRange plain = Traits::kMasked && params.transform_scores
                               ? BlockRange{0, 0}
                               : plain_blocks(params.mask, first_row, row_end, Traits::kTileN);
  Fp8Consumer<Traits> self{params,  shared, k_ring, v_ring, {consumer}, {consumer},
                           softmax, sink,   row,    {},     1.0f,       nullptr};
  const TileMessage message = sink.tile(shared.barriers);
  const bool share = params.scales.k != nullptr && !scales_each_key(params);
  if (share) self.key_scales = key_scales(params, message);
  read_row_factors(params, message, row, self.row_factor);
  if constexpr (Traits::kTokenSums) self.clear_row_sums();
  self.load_key_scale(own.end - 1);
  auto release_q = [&] {  // where O lies on Q, the epilogue releases it
    if (!Traits::o_on_q(params.v_transposed)) arrive_warp(shared.barriers.q_empty[consumer]);
  };
  shared.barriers.q_full[consumer].wait(q_phase);
  cute::clear(rO);
  self.skip(blocks.end - own.end);
  if (own.empty()) {
    release_q();
    return;
  }
  if constexpr (Traits::kConfig.overlap_products) {
    attend_overlapped(self, consumer, own, plain, rO, release_q);
  } else {
    attend_in_parts(self, consumer, own, plain, rO, release_q);
  }
  self.skip(own.begin - blocks.begin);
}

}  // namespace hopper_attention
