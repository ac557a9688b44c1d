// Three consumers that share a block's keys. Each computes S, P, dP and dS of all queries and a
// third of the keys, and 64 columns of dQ = dS K, dK^T = Q^T dS and dV^T = dO^T P.
#pragma once

#include "backward/part_mma.cuh"

namespace hopper_attention {

// kValues: the consumer has columns of dV.
//
// The next step's S is issued under this one's dK, so that the tensor cores always have something
// to do: P is computed under dP's product, dS under dV's, and dQ leaves its registers under dK's.
//
// There is one buffer each of dO, P and dS, and nothing to wait for but that they are full:
//  - who sees a step's dO knows that all consumers gave back the last step's, behind dV's product,
//    which was the last to read the last step's P;
//  - who sees all of a step's P knows that all consumers have this step's S, and so are done with
//    the products before it, dQ's and dK's of the last step's dS.
template <class Traits, bool kValues, class GradientK, class GradientV>
CUTE_DEVICE void accumulate_third(BackwardParams const& params, KeyTile const& tile,
                                  typename Traits::SharedStorage& shared, int consumer, int thread,
                                  GradientK& rdK, GradientV& rdV) {
  using namespace cute;
  using Part = PartTraits<Traits>;
  using Step = StepCount<Traits::kStages>;
  static_assert(Traits::kDoutStages == 1 && Traits::kDsStages == 1, "see above");
  auto& barriers = shared.barriers;
  auto adder = make_dq_adder<Traits>(params, shared, consumer, thread);

  const int row = thread / 32 * 16 + thread % 32 / 4;
  const int first_key = tile.n_block * Traits::kTileN + consumer * Part::kKeys + thread % 4 * 2;
  const BlockRange plain = plain_steps<Traits>(tile_mask<Traits>(params, shared), tile);
  Step at_step;
  QuerySteps at = query_steps(params, tile);
  if (!at.done()) {
    barriers.k_full[0].wait(0);
    barriers.v_full[0].wait(0);
  }
  Tensor rS = partition_fragment_C(typename Part::MmaScores{}, typename Part::ShapeScores{});
  auto issue_scores = [&](Step of, bool exists) __attribute__((always_inline)) {
    if (exists) barriers.q_full[of.stage()].wait(of.phase());
    issue_part_scores<Traits, typename Traits::LayoutQ, typename Traits::LayoutK>(
        shared.q[0], shared.k[0], of.stage(), consumer, rS);
  };
  auto step = [&](auto kPlain) __attribute__((always_inline)) {
    const int stage = at_step.stage();
    Tensor rdP = partition_fragment_C(typename Part::MmaScores{}, typename Part::ShapeScores{});
    barriers.dout_full[0].wait(at_step.count % 2);
    issue_part_scores<Traits, typename Traits::LayoutDo, typename Traits::LayoutV>(
        shared.dout[0], shared.v[0], 0, consumer, rdP);
    exponentiate_rows<Traits>(params, row_pair(shared.lse_log2[stage], row), rS);
    if constexpr (!kPlain) {
      const int first_row = at.m_block * Traits::kTileM + row;
      mask_rows<Traits>(tile_mask<Traits>(params, shared), first_row, first_key, rS);
    }
    Tensor rounded = make_tensor<typename Traits::Element>(rS.layout());
    convert_fragment<typename Traits::Element>(rS, rounded);
    write_part<Traits>(shared.p16[0], 0, consumer, thread, rounded);
    sync_consumers(Traits::kConsumers);
    if constexpr (kValues) issue_part_gradient<Traits, true>(shared, consumer, 0, 0, false, rdV);
    warpgroup_wait<kValues>();
    warpgroup_fence_operand(rdP);
    round_ds_rows<Traits>(params, row_pair(shared.delta[0], row),
                          row_pair(shared.lse_log2[stage], row), rS, rdP, rounded);
    write_part<Traits>(shared.ds[0], 0, consumer, thread, rounded);
    sync_consumers(Traits::kConsumers);
    Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
    issue_dq<Traits>(dq_operands<Traits>(*anew(&shared), consumer * kWarpgroupThreads), 0, 0, 0,
                     rdQ);
    if constexpr (kValues) {
      warpgroup_wait<1>();
      warpgroup_fence_operand(rdV);
    }
    arrive_warp(barriers.dout_empty[0]);
    issue_part_gradient<Traits, false>(shared, consumer, stage, 0, false, rdK);
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdQ);
    adder.begin();
    adder.add(rdQ, at.block, 0);
    adder.end();
    ++at_step.count;
    issue_scores(at_step, !at.last());
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdK);
    arrive_warp(barriers.q_empty[stage]);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);
  };
  start_gradients(rdK, rdV);
  issue_scores(at_step, !at.done());
  warpgroup_wait<0>();
  warpgroup_fence_operand(rS);
  for_each_step<Traits>(at, plain, step);
}

}  // namespace hopper_attention
