// Three consumers that share a block's keys, with 64 columns each of dK^T = Q^T dS and
// dV^T = dO^T P. Two compute S, P, dP and dS of all queries and half of the keys, the last one
// dQ = dS K.
#pragma once

#include "backward/part_mma.cuh"

namespace hopper_attention {

// A product of scores reads its queries from shared memory for each consumer, of however few keys:
// so two consumers have all of them, and the third has what each would else do of dQ.
//
// The next step's S is issued under this one's dK, so that the tensor cores always have something
// to do: P is computed under dP's product (but with a soft cap), dS under dV's, and dQ leaves the
// third's registers under products of all.
//
// There is one buffer each of dO, P and dS, and nothing to wait for but that they are full:
//  - who sees a step's dO knows that all consumers gave back the last step's, behind dV's product,
//    which was the last to read the last step's P;
//  - who sees all of a step's P knows that those with scores have this step's S, and that the last
//    one has all of the last step's dQ: so all are done with the last step's dS.
template <class Traits, class GradientK, class GradientV>
CUTE_DEVICE void accumulate_scores_third(BackwardParams const& params, KeyTile const& tile,
                                         typename Traits::SharedStorage& shared, int consumer,
                                         int thread, GradientK& rdK, GradientV& rdV) {
  using namespace cute;
  using Part = PartTraits<Traits>;
  using Step = StepCount<Traits::kStages>;
  static_assert(Traits::kDoutStages == 1 && Traits::kDsStages == 1, "see above");
  auto& barriers = shared.barriers;

  const int row = fragment_first_row(thread);
  const std::uint32_t offset = part_offset<Traits>(thread);
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
    auto issue_dp = [&]() __attribute__((always_inline)) {
      barriers.dout_full[0].wait(at_step.count % 2);
      issue_part_scores<Traits, typename Traits::LayoutDo, typename Traits::LayoutV>(
          shared.dout[0], shared.v[0], 0, consumer, rdP);
    };
    if constexpr (!Traits::kCapped) issue_dp();
    exponentiate_rows<Traits>(params, row_pair(shared.lse_log2[stage], row), rS);
    if constexpr (!kPlain) {
      const int first_row = at.m_block * Traits::kTileM + row;
      mask_rows<Traits>(tile_mask<Traits>(params, shared), first_row, first_key, rS);
    }
    if constexpr (Traits::kCapped) issue_dp();  // tanh leaves no registers for it
    write_part<Traits>(shared.p16[0], consumer, offset, [&](int i) { return rS(i); });
    sync_consumers(Traits::kConsumers);
    issue_part_gradient<Traits, true>(shared, consumer, 0, 0, false, rdV);
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdP);
    const RowPair delta = row_pair(shared.delta[0], row);
    const RowPair lse_log2 = row_pair(shared.lse_log2[stage], row);
    write_part<Traits>(shared.ds[0], consumer, offset, [&](int i) {
      return ds_of_rows<Traits>(params, delta, lse_log2, rS, rdP, i);
    });
    sync_consumers(Traits::kConsumers);
    issue_part_gradient<Traits, false>(shared, consumer, stage, 0, false, rdK);
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdV);
    arrive_warp(barriers.dout_empty[0]);
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

// The last consumer. kValues: it has columns of dV. dQ is computed in as many parts as there are
// consumers, each handed to the producer under the product behind it.
template <class Traits, bool kValues, class GradientK, class GradientV>
CUTE_DEVICE void accumulate_dq_third(BackwardParams const& params, KeyTile const& tile,
                                     typename Traits::SharedStorage& shared, int consumer,
                                     int thread, GradientK& rdK, GradientV& rdV) {
  using namespace cute;
  static_assert(Traits::kConsumers == 3, "three parts of dQ");
  auto& barriers = shared.barriers;
  auto adder = make_dq_adder<Traits>(params, shared, 0, thread);
  Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
  auto issue = [&](int part) __attribute__((always_inline)) {
    issue_dq<Traits>(dq_operands<Traits>(*anew(&shared), part * kWarpgroupThreads), 0, 0, 0, rdQ);
  };
  auto add = [&](int part) __attribute__((always_inline)) {
    warpgroup_fence_operand(rdQ);
    adder.add(rdQ, 0, part);
  };
  StepCount<Traits::kStages> at_step;
  int left = max(tile.m_blocks.end - tile.m_blocks.begin, 0) * params.heads_per_kv;
  if (left != 0) barriers.k_full[0].wait(0);
  start_gradients(rdK, rdV, rdQ);
  for (; left != 0; --left) {
    const int stage = at_step.stage();
    if constexpr (kValues) barriers.dout_full[0].wait(at_step.count % 2);
    barriers.q_full[stage].wait(at_step.phase());
    sync_consumers(Traits::kConsumers);
    if constexpr (kValues) issue_part_gradient<Traits, true>(shared, consumer, 0, 0, false, rdV);
    sync_consumers(Traits::kConsumers);
    adder.begin();
    issue(0);
    if constexpr (kValues) {
      warpgroup_wait<1>();
      warpgroup_fence_operand(rdV);
    }
    arrive_warp(barriers.dout_empty[0]);
    issue_part_gradient<Traits, false>(shared, consumer, stage, 0, false, rdK);
    warpgroup_wait<1>();
    add(0);
    issue(1);
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdK);
    arrive_warp(barriers.q_empty[stage]);
    warpgroup_wait<0>();
    add(1);
    issue(2);
    warpgroup_wait<0>();
    add(2);
    adder.end();
    ++at_step.count;
  }
}

}  // namespace hopper_attention
