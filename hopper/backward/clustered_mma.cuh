// The second consumer of a pair whose block belongs to a cluster: dP, dS and dK, and its part of
// dQ, each product a step late where that leaves the tensor cores something to do.
//
// A step issues the last step's dK, its own dP behind it, and the last step's dQ behind that; so
// dS, which waits for dP alone, is computed under dQ's product, and the dQ of the step before the
// last is added under dK's and dP's.
#pragma once

#include "backward/paired_mma.cuh"

namespace hopper_attention {

// What a step leaves to the ones behind it. In the first step there is nothing yet: its late
// products are made all the same, of whatever the buffers hold, since a branch between products in
// flight makes ptxas serialise them. dK starts from 0 behind it, and that dQ is never added.
template <class Traits>
struct LateKeys {
  using Step = StepCount<Traits::kStages>;

  Step at_step;
  std::int64_t last_block = 0, block_before = 0;  // of the last step and the one before, for dQ

  CUTE_DEVICE bool first() const { return at_step.count == 0; }
  CUTE_DEVICE Step last() const { return {at_step.count - 1}; }
  CUTE_DEVICE bool starts_dk() const { return at_step.count < 2; }
  CUTE_DEVICE bool has_block_before() const { return at_step.count > 1; }
  CUTE_DEVICE void advance(std::int64_t block) {
    block_before = last_block;
    last_block = block;
    ++at_step.count;
  }
};

// dK += dS^T Q, or = where it starts.
template <class MmaDk, class Operand, class Queries, class GradientK>
CUTE_DEVICE void issue_late_dk(Operand& ds16, Queries const& queries, bool starts, GradientK& rdK) {
  using namespace cute;
  MmaDk mma;
  warpgroup_fence_operand(ds16);
  warpgroup_fence_operand(rdK);
  warpgroup_arrive();
  mma.accumulate_ = starts ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int k = 0; k < decltype(size<2>(ds16))::value; ++k) {
    gemm(mma, ds16(_, _, k), queries(_, _, k), rdK);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(rdK);
  warpgroup_fence_operand(ds16);
}

template <class Traits, class GradientK>
CUTE_DEVICE void accumulate_cluster_keys(BackwardParams const& params, KeyTile const& tile,
                                         typename Traits::SharedStorage& shared, int thread,
                                         GradientK& rdK) {
  using namespace cute;
  using Element = typename Traits::Element;
  using Late = LateKeys<Traits>;
  auto& barriers = shared.barriers;
  typename Traits::MmaScores mma_scores;
  Tensor sV = make_tensor(make_smem_ptr(shared.v[0]), typename Traits::LayoutV{});
  Tensor tPrV = mma_scores.get_thread_slice(0).partition_fragment_A(sV);  // (MMA, 1, dv/16)
  auto queries = query_operands<Traits, typename Traits::MmaScores>(shared, 0);
  Tensor tPrdO = get<1>(queries);
  Tensor tKrQ = get<3>(queries);
  auto own = dq_operands<Traits>(shared, kWarpgroupThreads);
  auto writer = ds_writer<Traits>(shared, thread);
  auto adder = make_dq_adder<Traits>(params, shared, 1, thread);
  const int rank = cluster_rank<Traits>(tile);

  static_assert(Traits::kStages == Traits::kDsStages, "one counter for both");
  Late late;
  QuerySteps at = query_steps(params, tile);
  if (!at.done()) {
    barriers.v_full[0].wait(0);
    barriers.k_full[0].wait(0);
  }
  Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
  Tensor rdS =
      make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Traits::kTileM / 16>>>{});
  fill(rdS, Element(0.0f));
  start_gradients(rdK, rdQ);
  auto issue_late_dq = [&] {
    const auto last = late.last();
    if (!late.first()) {
      barriers.ds_full[last.stage()].wait(last.phase());
      barriers.peer_ds_full[last.stage()].wait(last.phase());
    }
    issue_dq<Traits>(own, last.stage(), 0, rank, rdQ);
    issue_dq<Traits, false>(peer_dq_operands<Traits>(shared, kWarpgroupThreads), last.stage(), 0, 0,
                            rdQ);
  };
  auto wait_for_late_dq = [&] {
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdQ);
    if (!late.first()) return_ds<Traits>(shared, late.last().stage(), rank);
  };
  auto add_dq = [&](std::int64_t block) {
    adder.begin();
    adder.add(rdQ, block, 0);
    adder.end();
  };
  auto issue_dk_and_add = [&] {
    issue_late_dk<typename Traits::MmaDk>(rdS, tKrQ(_, _, _, late.last().stage()), late.starts_dk(),
                                          rdK);
    if (late.has_block_before()) add_dq(late.block_before);
  };

  for (; !at.done(); at.advance()) {
    const int stage = late.at_step.stage();
    Tensor rdP = partition_fragment_C(mma_scores, Shape<typename Traits::N, typename Traits::M>{});
    issue_dk_and_add();
    const StepCount<Traits::kDoutStages> dout_step{late.at_step.count};
    const int dout_stage = dout_step.stage();
    barriers.dout_full[dout_stage].wait(dout_step.phase());
    issue_product<true>(mma_scores, tPrV, tPrdO(_, _, _, dout_stage), rdP);
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdK);
    warpgroup_fence_operand(rdS);
    if (!late.first()) arrive_warp(barriers.q_empty[late.last().stage()]);
    issue_late_dq();
    barriers.q_full[stage].wait(late.at_step.phase());  // LSE and delta come with Q
    warpgroup_wait<2>();
    warpgroup_fence_operand(rdP);
    arrive_warp(barriers.dout_empty[dout_stage]);
    barriers.p_full.wait(late.at_step.p_phase());
    take_p<Traits>(params, shared, stage, thread, rdP, rdS);
    __syncwarp();
    arrive_warp(barriers.p_empty);

    barriers.ds_empty[stage].wait(late.at_step.phase() ^ 1);
    write_ds(writer, stage, rdS, rdP.layout());
    __syncwarp();
    arrive_warp(barriers.ds_full[stage]);
    wait_for_late_dq();
    late.advance(at.block);
  }
  if (late.first()) return;
  issue_dk_and_add();
  warpgroup_wait<0>();
  warpgroup_fence_operand(rdK);
  issue_late_dq();
  wait_for_late_dq();
  add_dq(late.last_block);
}

}  // namespace hopper_attention
