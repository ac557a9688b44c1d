// The consumer that is like the others: from its keys and all query blocks that see them to their
// dK and dV, and to its part of dQ.
//
// With the keys as rows, P and dS come out of S^T = K Q^T and dP^T = V dO^T as the register
// operands of dV = P^T dO and dK = dS^T Q. Only dQ = dS K, which sums over the keys of all
// consumers, reads dS from shared memory.
#pragma once

#include "backward/add_dq.cuh"

namespace hopper_attention {

// The operands of a consumer's share of dQ = dS K.
template <class Traits>
CUTE_DEVICE auto dq_operands(typename Traits::SharedStorage& shared, int first_thread) {
  using namespace cute;
  auto slice = typename Traits::MmaDq{}.get_thread_slice(first_thread);
  Tensor sKt = make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutKts{});
  Tensor sdS = make_tensor(make_smem_ptr(shared.ds[0]), typename Traits::LayoutDs{});
  return make_tuple(slice.partition_fragment_A(sdS), slice.partition_fragment_B(sKt));
}

// Issues one slice of it, or adds to it. slot: which K.
template <class Traits, bool kFresh = true, class Operands, class Fragment>
CUTE_DEVICE void issue_dq(Operands const& operands, int ds_stage, int slot, int slice,
                          Fragment& dq) {
  using namespace cute;
  typename Traits::MmaDq mma;
  auto const& a = get<0>(operands);
  auto const& b = get<1>(operands);
  warpgroup_fence_operand(dq);
  warpgroup_arrive();
  mma.accumulate_ = kFresh ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int k = 0; k < Traits::kTileN / 16; ++k) {
    gemm(mma, a(_, 0, k, ds_stage), b(_, slice, k, slot), dq(_, 0, 0));
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(dq);
}

// dS^T of a consumer's keys into shared memory, where dQ's product reads it as dS. A thread's
// addresses are then one and constants: 16 rows further the swizzle is the same.
template <class Traits>
CUTE_DEVICE auto ds_writer(typename Traits::SharedStorage& shared, int tile_thread) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto copy_ds =
      make_tiled_copy_C(Copy_Atom<SM90_U16x8_STSM_T, Element>{}, typename Traits::MmaScores{});
  auto thread_copy = copy_ds.get_thread_slice(tile_thread);
  Tensor sdSt = as_position_independent_swizzle_tensor(
      make_tensor(make_smem_ptr(shared.ds[0]), typename Traits::LayoutDst{}));
  return make_tuple(copy_ds, thread_copy, thread_copy.partition_D(sdSt));
}
template <class Writer, class Operand, class Layout>
CUTE_DEVICE void write_ds(Writer const& writer, int ds_stage, Operand& ds16, Layout const& layout) {
  using namespace cute;
  Tensor from = make_tensor(ds16.data(), layout);
  copy(get<0>(writer), get<1>(writer).retile_S(from), get<2>(writer)(_, _, _, ds_stage));
  tma_store_fence();  // the tensor cores read what ordinary stores wrote
}

// Q and dO as the right operands of S's, dP's, dV's and dK's products: (MMA, 1, columns/16, stages)
// both of the first two, (MMA, 1, m/16, stages) of the others. Descriptors are the same for all
// threads of a consumer.
template <class Traits, class MmaKeys>
CUTE_DEVICE auto query_operands(typename Traits::SharedStorage& shared, int first_thread) {
  using namespace cute;
  Tensor sQ = make_tensor(make_smem_ptr(shared.q[0]), typename Traits::LayoutQ{});
  Tensor sQt = make_tensor(make_smem_ptr(shared.q[0]), typename Traits::LayoutQt{});
  Tensor sdO = make_tensor(make_smem_ptr(shared.dout[0]), typename Traits::LayoutDo{});
  Tensor sdOt = make_tensor(make_smem_ptr(shared.dout[0]), typename Traits::LayoutDot{});
  typename Traits::MmaScores mma_dp;
  typename Traits::MmaDv mma_dv;
  typename Traits::MmaDk mma_dk;
  return make_tuple(MmaKeys{}.get_thread_slice(first_thread).partition_fragment_B(sQ),
                    mma_dp.get_thread_slice(first_thread).partition_fragment_B(sdO),
                    mma_dv.get_thread_slice(first_thread).partition_fragment_B(sdOt),
                    mma_dk.get_thread_slice(first_thread).partition_fragment_B(sQt));
}

// The first of a thread's two keys; part: which kConsumerRows keys of the tile are its consumer's.
template <class Traits>
CUTE_DEVICE int first_key_of(KeyTile const& tile, int part, int thread) {
  return fragment_first_row(thread, tile.n_block * Traits::kTileN + part * kConsumerRows);
}

// Where there is one V, behind a step's dP: behind the last one V may be the next tile's. Behind
// wait_for_gradients, too: ahead of it ptxas keeps exponentials out of dQ's product (3% at d96).
template <class Traits>
CUTE_DEVICE void pass_values(typename Traits::Barriers& barriers, QuerySteps const& at) {
  if constexpr (Traits::kSharedValues) {
    if (at.last()) arrive_warp(barriers.v_empty[0]);
  }
}
// Likewise, ahead of writing dS: the last tile's dV must have left its buffers. slot: the tile's.
template <class Traits>
CUTE_DEVICE void wait_for_gradients(typename Traits::Barriers& barriers, int slot) {
  if constexpr (Traits::kSharedValues) barriers.gradients_read[0].wait(slot ^ 1);
}
// Of a tile without steps.
template <class Traits>
CUTE_DEVICE void skip_values(typename Traits::Barriers& barriers) {
  if constexpr (Traits::kSharedValues) arrive_warp(barriers.v_empty[0]);
}

// A step's P and dS in 16 bits, from S and from dP, for whose product it waits: all but kBehind of
// those under way. slot: the tile's; stage and phase: the step's. Whoever has waited so may write
// dS.
template <class Traits, int kBehind, class Plain, class Scores, class Operand>
CUTE_DEVICE void make_operands(BackwardParams const& params, typename Traits::SharedStorage& shared,
                               Plain plain, QuerySteps const& at, int slot, int first_key,
                               int stage, std::uint32_t phase, Scores& rS, Scores& rdP, Operand& rP,
                               Operand& rdS) {
  auto& barriers = shared.barriers;
  exponentiate<Traits>(params, shared.lse_log2[stage], rS);
  if constexpr (!plain) {
    mask_scores<Traits>(tile_mask<Traits>(params, shared, slot), first_key, at.m_block, rS);
  }
  if constexpr (!Traits::kDsWaits) wait_for_gradients<Traits>(barriers, slot);
  cute::warpgroup_wait<kBehind>();
  cute::warpgroup_fence_operand(rdP);
  if constexpr (Traits::kDsWaits) wait_for_gradients<Traits>(barriers, slot);
  pass_values<Traits>(barriers, at);
  if constexpr (Traits::kDsWaits) barriers.ds_empty[stage].wait(phase ^ 1);
  differentiate<Traits>(params, shared.delta[stage], shared.lse_log2[stage], rS, rdP, rP, rdS);
}

// All tiles of the block. hand_over(tile, slot, dK, dV): what is to be done with a tile's
// gradients.
template <class Traits, class HandOver>
CUTE_DEVICE void consume_alike(BackwardParams const& params, typename Traits::SharedStorage& shared,
                               int consumer, int thread, HandOver hand_over) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto& barriers = shared.barriers;
  typename Traits::MmaScores mma_scores;
  typename Traits::MmaDv mma_dv;
  typename Traits::MmaDk mma_dk;
  Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutKs{});
  Tensor sV = make_tensor(make_smem_ptr(shared.v[0]), typename Traits::LayoutVs{});

  const int first_thread = consumer * kWarpgroupThreads;
  auto queries = query_operands<Traits, typename Traits::MmaScores>(shared, first_thread);
  Tensor tSrQ = get<0>(queries), tPrdO = get<1>(queries);
  Tensor tVrdO = get<2>(queries), tKrQ = get<3>(queries);
  auto slice_scores = mma_scores.get_thread_slice(first_thread);
  Tensor tSrK = slice_scores.partition_fragment_A(sK);  // (MMA, 1, d/16, slots)
  Tensor tPrV = slice_scores.partition_fragment_A(sV);  // (MMA, 1, dv/16, buffers)
  auto operands = dq_operands<Traits>(shared, first_thread);
  auto writer = ds_writer<Traits>(shared, first_thread + thread);
  auto adder = make_dq_adder<Traits>(params, shared, consumer, thread);

  using ShapeScores = Shape<typename Traits::N, typename Traits::M>;
  static_assert(Traits::kStages == Traits::kDsStages, "one ring for both");
  Ring<Traits::kStages> ring;
  // Ahead, the next step's S is issued under this step's dK.
  constexpr bool kAhead = Traits::kAheadScores;
  for (TileSink<Traits> tiles; tiles.next(shared); tiles.slot.advance()) {
    const int slot = tiles.slot.stage;
    const KeyTile tile = told_tile<Traits>(shared, slot);
    const int first_key = first_key_of<Traits>(tile, consumer, thread);
    const BlockRange plain = plain_steps<Traits>(tile_mask<Traits>(params, shared, slot), tile);
    QuerySteps at = query_steps(params, tile);
    Tensor rS = partition_fragment_C(mma_scores, ShapeScores{});
    Tensor rdK = partition_fragment_C(mma_dk, Shape<typename Traits::N, typename Traits::D>{});
    Tensor rdV = partition_fragment_C(mma_dv, Shape<typename Traits::N, typename Traits::Dv>{});
    // A tile's last step issues one more, which nobody needs: a branch around the product would
    // make ptxas wait for those in flight.
    auto issue_scores = [&](bool exists) {
      if (exists) barriers.q_full[ring.stage].wait(ring.phase);
      Tensor keys = tSrK(_, _, _, slot);
      issue_product<true>(mma_scores, keys, tSrQ(_, _, _, ring.stage), rS);
    };
    auto step = [&](auto kPlain) {
      const int stage = ring.stage;
      const std::uint32_t phase = ring.phase;
      Tensor rdP = partition_fragment_C(mma_scores, ShapeScores{});
      if constexpr (!kAhead) issue_scores(true);
      barriers.dout_full[stage].wait(phase);
      Tensor values = tPrV(_, _, _, slot % Traits::kValueBuffers);
      issue_product<true>(mma_scores, values, tPrdO(_, _, _, stage), rdP);
      if constexpr (!kAhead) {
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
      }
      // As register operands P^T and dS^T have their accumulators' elements in the same order.
      using LayoutA = Layout<Shape<Shape<_2, _2, _2>, _1, Int<Traits::kTileM / 16>>>;
      Tensor rP = make_tensor<Element>(LayoutA{});
      Tensor rdS = make_tensor<Element>(LayoutA{});
      make_operands<Traits, 0>(params, shared, kPlain, at, slot, first_key, stage, phase, rS, rdP,
                               rP, rdS);
      write_ds(writer, stage, rdS, rS.layout());
      __syncwarp();
      arrive_warp(barriers.ds_full[stage]);
      issue_product<false>(mma_dv, rP, tVrdO(_, _, _, stage), rdV);
      barriers.ds_full[stage].wait(phase);
      Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
      issue_dq<Traits>(operands, stage, slot, 0, rdQ);
      warpgroup_wait<1>();
      warpgroup_fence_operand(rdV);
      arrive_warp(barriers.dout_empty[stage]);
      issue_product<false>(mma_dk, rdS, tKrQ(_, _, _, stage), rdK);
      ring.advance();
      // Adds out of registers hold a warp at the next branch, as in the next S's barrier, until
      // their dQ has been read. Those by bulk reductions are short, and better come before the next
      // S.
      constexpr bool kScoresFirst = kAhead && !Traits::kDqBulk;
      if constexpr (kScoresFirst) {
        issue_scores(!at.last());
        warpgroup_wait<2>();
      } else {
        warpgroup_wait<1>();
      }
      warpgroup_fence_operand(rdQ);
      if constexpr (Traits::kDsWaits) arrive_warp(barriers.ds_empty[stage]);
      adder.begin();
      adder.add(rdQ, at.block, 0);
      adder.end();
      if constexpr (kAhead && !kScoresFirst) issue_scores(!at.last());
      if constexpr (kAhead) {
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      warpgroup_fence_operand(rdK);
      arrive_warp(barriers.q_empty[stage]);
      if constexpr (kAhead) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(rS);
      }
    };
    barriers.k_full[slot].wait(tiles.slot.phase);
    barriers.v_full[slot].wait(tiles.slot.phase);
    if (at.done()) {
      skip_values<Traits>(barriers);
    } else if constexpr (kAhead) {
      issue_scores(true);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
    }
    start_gradients(rdK, rdV);
    for_each_step<Traits>(at, plain, step);
    hand_over(tile, slot, rdK, rdV);
  }
}

}  // namespace hopper_attention
