// Consumers that share a block of 64 keys, for head dimensions whose dK and dV do not fit one
// consumer's registers together: the first computes S, P and dV, the second dP, dS and dK, and each
// half of the block's dQ. Two such blocks are a cluster (cluster_dq.cuh).
//
// P goes from the first to the second in float32, in the order of their registers, and dS from the
// second to both as dQ's operand. The first runs ahead: it multiplies for dQ a step late, when dS
// has long been there. The second is in clustered_mma.cuh.
#pragma once

#include "backward/cluster_dq.cuh"

namespace hopper_attention {

// Where a step's buffers are: one counter in place of a ring for each kind of buffer, since every
// register counts here.
template <int kStages>
struct StepCount {
  unsigned int count = 0;

  CUTE_DEVICE int stage() const { return count % kStages; }
  CUTE_DEVICE std::uint32_t phase() const { return count / kStages % 2; }
  CUTE_DEVICE std::uint32_t p_phase() const { return count % 2; }
};

// A thread's P in the buffer between the two, 16 bytes at a time.
template <class Traits>
CUTE_DEVICE float4* p_buffer(typename Traits::SharedStorage& shared, int thread) {
  return reinterpret_cast<float4*>(shared.p) + thread;
}

// The first consumer.
template <class Traits, class GradientV>
CUTE_DEVICE void accumulate_values(BackwardParams const& params, KeyTile const& tile,
                                   typename Traits::SharedStorage& shared, int thread,
                                   GradientV& rdV) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto& barriers = shared.barriers;
  typename Traits::MmaScores mma_scores;
  typename Traits::MmaDv mma_dv;
  Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutK{});
  Tensor tSrK = mma_scores.get_thread_slice(0).partition_fragment_A(sK);  // (MMA, 1, d/16)
  auto queries = query_operands<Traits, typename Traits::MmaScores>(shared, 0);
  Tensor tSrQ = get<0>(queries);
  Tensor tVrdO = get<2>(queries);
  auto operands = dq_operands<Traits>(shared, 0);
  auto adder = make_dq_adder<Traits>(params, shared, 0, thread);

  const int first_key = first_key_of<Traits>(tile, 0, thread);
  const BlockRange plain = plain_steps<Traits>(tile_mask<Traits>(params, shared), tile);
  static_assert(Traits::kStages == Traits::kDsStages, "one counter for both");
  StepCount<Traits::kStages> at_step;
  std::int64_t late_block = -1;  // of the last step, whose dQ is still to be multiplied; none yet
  // release: gives back what the products before dQ's have read.
  auto multiply = [&](StepCount<Traits::kStages> of, auto release) {
    multiply_cluster_dq<Traits>(shared, operands, 0, cluster_rank<Traits>(tile), of.stage(),
                                of.phase(), late_block, adder, release);
  };

  QuerySteps at = query_steps(params, tile);
  auto step = [&](auto kPlain) {
    const int stage = at_step.stage();
    Tensor rS = partition_fragment_C(mma_scores, Shape<typename Traits::N, typename Traits::M>{});
    barriers.q_full[stage].wait(at_step.phase());
    issue_product<true>(mma_scores, tSrK, tSrQ(_, _, _, stage), rS);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);
    exponentiate<Traits>(params, shared.lse_log2[stage], rS);
    arrive_warp(barriers.q_empty[stage]);
    if constexpr (!kPlain) {
      mask_scores<Traits>(tile_mask<Traits>(params, shared), first_key, at.m_block, rS);
    }
    barriers.p_empty.wait(at_step.p_phase() ^ 1);
    float4* to = p_buffer<Traits>(shared, thread);
    CUTE_UNROLL
    for (int i = 0; i < decltype(size(rS))::value; i += 4) {
      to[i / 4 * kWarpgroupThreads] = make_float4(rS(i), rS(i + 1), rS(i + 2), rS(i + 3));
    }
    __syncwarp();
    arrive_warp(barriers.p_full);

    Tensor rP =
        make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Traits::kTileM / 16>>>{});
    convert_fragment<Element>(rS, rP);
    const StepCount<Traits::kDoutStages> dout_step{at_step.count};
    const int dout_stage = dout_step.stage();
    barriers.dout_full[dout_stage].wait(dout_step.phase());
    issue_product<false>(mma_dv, rP, tVrdO(_, _, _, dout_stage), rdV);
    auto release_dout = [&] { arrive_warp(barriers.dout_empty[dout_stage]); };
    // dQ's product is behind dV's on the tensor cores. dO goes back as soon as dV's is done: its
    // only buffer is the next step's.
    if (late_block >= 0) {
      multiply({at_step.count - 1}, release_dout);
    } else {
      warpgroup_wait<0>();
      release_dout();
    }
    warpgroup_fence_operand(rdV);
    late_block = at.block;
    ++at_step.count;
  };
  if (!at.done()) barriers.k_full[0].wait(0);
  start_gradients(rdV);
  for_each_step<Traits>(at, plain, step);
  if (late_block >= 0) multiply({at_step.count - 1}, [] {});
}

// dS = P * (dP - delta) in 16 bits, from the P of the first consumer.
template <class Traits, class Scores, class Operand>
CUTE_DEVICE void take_p(BackwardParams const& params, typename Traits::SharedStorage& shared,
                        int stage, int thread, Scores const& dp, Operand& ds16) {
  const float4* from = p_buffer<Traits>(shared, thread);
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(dp))::value; i += 4) {
    round_ds<Traits>(params, shared.delta[stage], shared.lse_log2[stage],
                     from[i / 4 * kWarpgroupThreads], dp, i, ds16);
  }
}

}  // namespace hopper_attention
