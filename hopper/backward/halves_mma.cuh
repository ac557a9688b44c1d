// Two consumers that share a block's keys. Each computes S, P, dP and dS of all queries and half of
// the keys, and half of dQ; the first dV^T = dO^T P, the second dK^T = Q^T dS, of all keys.
//
// There are two buffers of P and dS each. That is all that the two have to wait for: a warp that
// has seen all of a step's dS knows that both are done with the step before, and its buffers are
// free.
#pragma once

#include "backward/part_mma.cuh"

namespace hopper_attention {

// The first consumer if kValues, else the second.
//
// A step ends with dQ's product. Its adds come in the next step, under the gradient's product.
template <class Traits, bool kValues, class Gradient>
CUTE_DEVICE void accumulate_half(BackwardParams const& params, KeyTile const& tile,
                                 typename Traits::SharedStorage& shared, int thread,
                                 Gradient& gradient) {
  using namespace cute;
  using Element = typename Traits::Element;
  using Part = PartTraits<Traits>;
  using Step = StepCount<Traits::kStages>;
  static_assert(Traits::kStages == Traits::kDsStages, "one counter for both");
  constexpr int kConsumer = kValues ? 0 : 1;
  auto& barriers = shared.barriers;
  auto adder = make_dq_adder<Traits>(params, shared, kConsumer, thread);

  const int row = thread / 32 * 16 + thread % 32 / 4;
  const int first_key = tile.n_block * Traits::kTileN + kConsumer * Part::kKeys + thread % 4 * 2;
  const BlockRange plain = plain_steps<Traits>(tile_mask<Traits>(params, shared), tile);
  Tensor rS = partition_fragment_C(typename Part::MmaScores{}, typename Part::ShapeScores{});
  Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
  std::int64_t late_block = 0;  // of the step before, as is rdQ
  Step at_step;
  QuerySteps at = query_steps(params, tile);
  if (!at.done()) {
    barriers.k_full.wait(0);
    barriers.v_full.wait(0);
  }
  // The gradient of the step before is done.
  auto release = [&] {
    const Step last{at_step.count - 1};
    warpgroup_fence_operand(gradient);
    if (at_step.count > 0) {
      arrive_warp(kValues ? barriers.dout_empty[last.stage()] : barriers.q_empty[last.stage()]);
    }
  };
  // What is left of the step before: its gradient, and dQ's adds. The first step has none before
  // it: its product is of what lies in the buffers, and the next one begins anew. A branch around
  // the product would make ptxas set registers aside anew in every step (C7519).
  auto finish = [&](auto kPlain) __attribute__((always_inline)) {
    const Step last{at_step.count - 1};
    issue_part_gradient<Traits, kValues>(shared, 0, last.stage(), last.stage(), at_step.count < 2,
                                         gradient);
    if constexpr (!kPlain) {  // else ptxas puts a wait into the masked step (C7517)
      warpgroup_wait<0>();
      release();
    }
    if (at_step.count > 0) {
      adder.begin();
      adder.add(rdQ, late_block, 0);
      adder.end();
    }
  };
  auto step = [&](auto kPlain) __attribute__((always_inline)) {
    const int stage = at_step.stage();
    const std::uint32_t phase = at_step.phase();
    finish(kPlain);
    barriers.q_full[stage].wait(phase);
    issue_part_scores<Traits, typename Traits::LayoutQ, typename Traits::LayoutK>(
        shared.q[0], shared.k, stage, kConsumer, rS);
    Tensor rdP = partition_fragment_C(typename Part::MmaScores{}, typename Part::ShapeScores{});
    barriers.dout_full[stage].wait(phase);
    issue_part_scores<Traits, typename Traits::LayoutDo, typename Traits::LayoutV>(
        shared.dout[0], shared.v, stage, kConsumer, rdP);
    warpgroup_wait<1>();
    if constexpr (kPlain) release();
    warpgroup_fence_operand(rS);
    exponentiate_rows<Traits>(params, row_pair(shared.lse_log2[stage], row), rS);
    if constexpr (kValues) arrive_warp(barriers.q_empty[stage]);
    if constexpr (!kPlain) {
      const int first_row = at.m_block * Traits::kTileM + row;
      mask_rows<Traits>(tile_mask<Traits>(params, shared), first_row, first_key, rS);
    }
    Tensor rounded = make_tensor<Element>(rS.layout());
    convert_fragment<Element>(rS, rounded);
    write_part<Traits>(shared.p16[0], stage, kConsumer, thread, rounded);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdP);
    round_ds_rows<Traits>(params, row_pair(shared.delta[stage], row),
                          row_pair(shared.lse_log2[stage], row), rS, rdP, rounded);
    write_part<Traits>(shared.ds[0], stage, kConsumer, thread, rounded);
    __syncwarp();
    arrive_warp(barriers.ds_full[stage]);
    if constexpr (!kValues) arrive_warp(barriers.dout_empty[stage]);
    barriers.ds_full[stage].wait(phase);
    issue_dq<Traits>(dq_operands<Traits>(*anew(&shared), kConsumer * kWarpgroupThreads), stage, 0,
                     rdQ);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdQ);
    late_block = at.block;
    ++at_step.count;
  };
  start_gradients(gradient);
  for_each_step<Traits>(at, plain, step);
  if (at_step.count > 0) finish(false_type{});
}

}  // namespace hopper_attention
