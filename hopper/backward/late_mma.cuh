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

// Q, dO and dS have as many stages each, so that one counter serves all.
template <class Traits, class GradientK, class GradientV>
CUTE_DEVICE void accumulate_late(BackwardParams const& params, KeyTile const& tile,
                                 typename Traits::SharedStorage& shared, int consumer, int thread,
                                 GradientK& rdK, GradientV& rdV) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto& barriers = shared.barriers;
  QuerySteps at = query_steps(params, tile);
  if (at.done()) {
    start_gradients(rdK, rdV);
    return;
  }
  using MmaKeys = typename Traits::MmaKeys;
  using MmaValues = typename Traits::MmaScores;
  MmaKeys mma_scores;
  MmaValues mma_dp;
  typename Traits::MmaDv mma_dv;
  typename Traits::MmaDk mma_dk;
  Tensor sK = make_tensor(make_smem_ptr(shared.k), typename Traits::LayoutK{});
  Tensor sV = make_tensor(make_smem_ptr(shared.v), typename Traits::LayoutV{});

  const int first_thread = consumer * kWarpgroupThreads;
  auto queries = query_operands<Traits, MmaKeys>(shared, first_thread);
  Tensor tSrQ = get<0>(queries), tPrdO = get<1>(queries);
  Tensor tVrdO = get<2>(queries), tKrQ = get<3>(queries);
  auto operands = dq_operands<Traits>(shared, first_thread);
  auto writer = ds_writer<Traits>(shared, first_thread + thread);
  auto adder = make_dq_adder<Traits>(params, shared, consumer, thread);

  const int first_key = first_key_of<Traits>(tile, consumer, thread);
  const BlockRange plain = plain_steps<Traits>(tile_mask<Traits>(params, shared), tile);
  using ShapeScores = Shape<typename Traits::N, typename Traits::M>;
  // As register operands P^T and dS^T have their accumulators' elements in the same order.
  using LayoutA = Layout<Shape<Shape<_2, _2, _2>, _1, Int<Traits::kTileM / 16>>>;
  using Place = Ring<Traits::kStages>;
  Place ring, before{Traits::kStages - 1, 1};
  Tensor rS = partition_fragment_C(mma_scores, ShapeScores{});
  Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
  std::int64_t block_before = -1;
  {
    // The first step's dQ, of the step before it, is not added. A branch around the product would
    // make ptxas set registers aside anew in every step (C7519).
    Tensor zeros = make_tensor<Element>(LayoutA{});
    clear(zeros);
    write_ds(writer, before.stage, zeros, rS.layout());
    sync_consumers(Traits::kConsumers);
  }
  barriers.k_full.wait(0);
  barriers.v_full.wait(0);
  Tensor tSrK = left_operand<MmaKeys>(sK, first_thread, thread);    // (MMA, 1, d/16)
  Tensor tPrV = left_operand<MmaValues>(sV, first_thread, thread);  // (MMA, 1, dv/16)
  auto issue_scores = [&](Place const& of, bool exists) {
    if (exists) barriers.q_full[of.stage].wait(of.phase);
    issue_product<true>(mma_scores, tSrK, tSrQ(_, _, _, of.stage), rS);
  };
  auto issue_late = [&] {
    barriers.ds_full[before.stage].wait(before.phase);
    issue_dq<Traits>(operands, before.stage, 0, rdQ);
  };
  auto add_late = [&] {
    arrive_warp(barriers.ds_empty[before.stage]);
    adder.begin();
    adder.add(rdQ, block_before, 0);
    adder.end();
  };
  auto step = [&](auto kPlain) {
    const int stage = ring.stage;
    Tensor rdP = partition_fragment_C(mma_dp, ShapeScores{});
    barriers.dout_full[stage].wait(ring.phase);
    issue_product<true>(mma_dp, tPrV, tPrdO(_, _, _, stage), rdP);
    issue_late();
    exponentiate<Traits>(params, shared.lse_log2[stage], rS);
    if constexpr (!kPlain) {
      mask_scores<Traits>(tile_mask<Traits>(params, shared), first_key, at.m_block, rS);
    }
    Tensor rP = make_tensor<Element>(LayoutA{});
    Tensor rdS = make_tensor<Element>(LayoutA{});
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdP);
    barriers.ds_empty[stage].wait(ring.phase ^ 1);
    differentiate<Traits>(params, shared.delta[stage], shared.lse_log2[stage], rS, rdP, rP, rdS);
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
  issue_scores(ring, true);
  warpgroup_wait<0>();
  warpgroup_fence_operand(rS);
  start_gradients(rdK, rdV);
  for_each_step<Traits>(at, plain, step);
  issue_late();
  warpgroup_wait<0>();
  warpgroup_fence_operand(rdQ);
  add_late();
}

}  // namespace hopper_attention
