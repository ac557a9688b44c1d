// The consumer alike whose dQ is a step late.
//
// dQ sums over the keys of all consumers. Where it is computed as soon as dS is written, consumers
// wait for each other there in every step, and so take their exponentials at the same time, when
// nothing is left to multiply. Here a step's dQ is issued behind the next step's dP: dS has long
// been there, dQ's product runs under the exponentials, and a consumer may lead by most of a step.
#pragma once

#include "backward/mma.cuh"

namespace hopper_attention {

// A consumer's rows of K or V as the left operand of Mma: descriptors of shared memory, or
// registers into which they have been loaded.
template <class Mma, class Shared>
CUTE_DEVICE auto left_operand(Shared const& shared, int first_thread, int thread) {
  using namespace cute;
  Mma mma;
  Tensor operand = mma.get_thread_slice(first_thread).partition_fragment_A(shared);
  if constexpr (!is_base_of<GMMA::DescriptorIterator, typename Mma::FrgTypeA>::value) {
    using Element = typename Shared::value_type;
    auto load = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
    auto slice = load.get_thread_slice(first_thread + thread);
    copy(load, slice.partition_S(shared), slice.retile_D(operand));
  }
  return operand;
}

// All tiles of the block, as consume_alike. Q, dO and dS have as many stages each, so that one
// counter serves all.
template <class Traits, class HandOver>
CUTE_DEVICE void consume_late(BackwardParams const& params, typename Traits::SharedStorage& shared,
                              int consumer, int thread, HandOver hand_over) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto& barriers = shared.barriers;
  using MmaKeys = typename Traits::MmaKeys;
  using MmaValues = typename Traits::MmaScores;
  MmaKeys mma_scores;
  MmaValues mma_dp;
  typename Traits::MmaDv mma_dv;
  typename Traits::MmaDk mma_dk;
  Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutKs{});
  Tensor sV = make_tensor(make_smem_ptr(shared.v[0]), typename Traits::LayoutVs{});

  const int first_thread = consumer * kWarpgroupThreads;
  auto queries = query_operands<Traits, MmaKeys>(shared, first_thread);
  Tensor tSrQ = get<0>(queries), tPrdO = get<1>(queries);
  Tensor tVrdO = get<2>(queries), tKrQ = get<3>(queries);
  auto operands = dq_operands<Traits>(shared, first_thread);
  auto writer = ds_writer<Traits>(shared, first_thread + thread);
  auto adder = make_dq_adder<Traits>(params, shared, consumer, thread);

  using ShapeScores = Shape<typename Traits::N, typename Traits::M>;
  // As register operands P^T and dS^T have their accumulators' elements in the same order.
  using LayoutA = Layout<Shape<Shape<_2, _2, _2>, _1, Int<Traits::kTileM / 16>>>;
  using Place = Ring<Traits::kStages>;
  Place ring, before{Traits::kStages - 1, 1};
  Tensor rS = partition_fragment_C(mma_scores, ShapeScores{});
  Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
  {
    // A tile's first dQ, of the step before it, is not added. A branch around the product would
    // make ptxas set registers aside anew in every step (C7519).
    Tensor zeros = make_tensor<Element>(LayoutA{});
    clear(zeros);
    write_ds(writer, before.stage, zeros, rS.layout());
    sync_consumers(Traits::kConsumers);
  }
  for (TileSink<Traits> tiles; tiles.next(shared); tiles.slot.advance()) {
    const int slot = tiles.slot.stage;
    const KeyTile tile = told_tile<Traits>(shared, slot);
    const int first_key = first_key_of<Traits>(tile, consumer, thread);
    const BlockRange plain = plain_steps<Traits>(tile_mask<Traits>(params, shared, slot), tile);
    Tensor rdK = partition_fragment_C(mma_dk, Shape<typename Traits::N, typename Traits::D>{});
    Tensor rdV = partition_fragment_C(mma_dv, Shape<typename Traits::N, typename Traits::Dv>{});
    std::int64_t block_before = -1;
    barriers.k_full[slot].wait(tiles.slot.phase);
    barriers.v_full[slot].wait(tiles.slot.phase);
    auto tSrK = left_operand<MmaKeys>(sK(_, _, slot), first_thread, thread);  // (MMA, 1, d/16)
    auto tPrV = left_operand<MmaValues>(sV(_, _, slot % Traits::kValueBuffers), first_thread,
                                        thread);  // (MMA, 1, dv/16)
    auto issue_scores = [&](Place const& of, bool exists) {
      if (exists) barriers.q_full[of.stage].wait(of.phase);
      issue_product<true>(mma_scores, tSrK, tSrQ(_, _, _, of.stage), rS);
    };
    auto issue_late = [&] {
      barriers.ds_full[before.stage].wait(before.phase);
      issue_dq<Traits>(operands, before.stage, slot, 0, rdQ);
    };
    auto add_late = [&] {
      if constexpr (Traits::kDsWaits) arrive_warp(barriers.ds_empty[before.stage]);
      adder.begin();
      adder.add(rdQ, block_before, 0);
      adder.end();
    };
    QuerySteps at = query_steps(params, tile);
    auto step = [&](auto kPlain) {
      const int stage = ring.stage;
      Tensor rdP = partition_fragment_C(mma_dp, ShapeScores{});
      barriers.dout_full[stage].wait(ring.phase);
      issue_product<true>(mma_dp, tPrV, tPrdO(_, _, _, stage), rdP);
      issue_late();
      Tensor rP = make_tensor<Element>(LayoutA{});
      Tensor rdS = make_tensor<Element>(LayoutA{});
      make_operands<Traits, 1>(params, shared, kPlain, at, slot, first_key, stage, ring.phase, rS,
                               rdP, rP, rdS);
      write_ds(writer, stage, rdS, rS.layout());
      __syncwarp();
      arrive_warp(barriers.ds_full[stage]);
      issue_product<false>(mma_dv, rP, tVrdO(_, _, _, stage), rdV);
      issue_product<false>(mma_dk, rdS, tKrQ(_, _, _, stage), rdK);
      warpgroup_wait<2>();
      warpgroup_fence_operand(rdQ);
      if (block_before >= 0) add_late();
      warpgroup_wait<1>();
      warpgroup_fence_operand(rdV);
      arrive_warp(barriers.dout_empty[stage]);
      before = ring;
      block_before = at.block;
      ring.advance();
      issue_scores(ring, !at.last());
      warpgroup_wait<1>();
      warpgroup_fence_operand(rdK);
      arrive_warp(barriers.q_empty[stage]);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
    };
    start_gradients(rdK, rdV);
    if (!at.done()) {
      issue_scores(ring, true);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
      for_each_step<Traits>(at, plain, step);
      issue_late();
      warpgroup_wait<0>();
      warpgroup_fence_operand(rdQ);
      add_late();
    } else {
      skip_values<Traits>(barriers);
    }
    hand_over(tile, slot, rdK, rdV);
  }
}

}  // namespace hopper_attention
