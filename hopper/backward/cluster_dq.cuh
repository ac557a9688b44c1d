// dQ of a cluster: two blocks of neighbouring keys, each with one half of dQ's columns for the keys
// of both, so that dQ is added half as often.
//
// Both go through the query blocks that see a key of either one. A block has its own keys, and of
// the other's the columns of its half; of dS each sends the other a copy, step by step, from shared
// memory to shared memory. A step's buffers of dS, its own and the other's copy, are free again
// when the consumers of both blocks have multiplied with them: ds_empty counts the warps of both.
#pragma once

#include "backward/mma.cuh"

namespace hopper_attention {

// A block's place in its cluster, and the slice of dQ that it adds.
template <class Traits>
CUTE_DEVICE int cluster_rank(KeyTile const& tile) {
  return tile.n_block % Traits::kCluster;
}

// As dq_operands, of the other block's dS and keys.
template <class Traits>
CUTE_DEVICE auto peer_dq_operands(typename Traits::SharedStorage& shared, int first_thread) {
  using namespace cute;
  using Columns = Int<Traits::kPeerColumns>;
  using LayoutKt =
      decltype(tile_to_shape(typename Traits::template AtomMN<Traits::kSlabK>{},
                             Shape<Columns, typename Traits::N, _1>{}, Step<_2, _1, _3>{}));
  auto slice = typename Traits::MmaDq{}.get_thread_slice(first_thread);
  Tensor sKt = make_tensor(make_smem_ptr(shared.peer_k), LayoutKt{});
  Tensor sdS = make_tensor(make_smem_ptr(shared.peer_ds[0]), typename Traits::LayoutDs{});
  return make_tuple(slice.partition_fragment_A(sdS), slice.partition_fragment_B(sKt));
}

// A warp has multiplied with both blocks' dS.
template <class Traits>
CUTE_DEVICE void return_ds(typename Traits::SharedStorage& shared, int stage, int rank) {
  if (cute::elect_one_sync()) {
    shared.barriers.ds_empty[stage].arrive();
    shared.barriers.ds_empty[stage].arrive(rank ^ 1);
  }
}

// One consumer's part of one step's dQ. Waits for its products, and calls release() when those
// issued before them are done. own: dq_operands.
template <class Traits, class Operands, class Adder, class Release>
CUTE_DEVICE void multiply_cluster_dq(typename Traits::SharedStorage& shared, Operands const& own,
                                     int consumer, int rank, int stage, std::uint32_t phase,
                                     std::int64_t block, Adder& adder, Release release) {
  using namespace cute;
  Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
  shared.barriers.ds_full[stage].wait(phase);
  issue_dq<Traits>(own, stage, 0, rank, rdQ);
  shared.barriers.peer_ds_full[stage].wait(phase);
  issue_dq<Traits, false>(peer_dq_operands<Traits>(shared, consumer * kWarpgroupThreads), stage, 0,
                          0, rdQ);
  warpgroup_wait<2>();
  release();
  warpgroup_wait<0>();
  warpgroup_fence_operand(rdQ);
  return_ds<Traits>(shared, stage, rank);
  adder.begin();
  adder.add(rdQ, block, 0);
  adder.end();
}

// One thread. Copies each step's dS into the other block's shared memory.
template <class Traits>
CUTE_DEVICE void send_ds(BackwardParams const& params, KeyTile const& tile,
                         typename Traits::SharedStorage& shared) {
  constexpr int kBytes = Traits::kDsElements * kElementBytes;
  auto& barriers = shared.barriers;
  const int peer = cluster_rank<Traits>(tile) ^ 1;
  Ring<Traits::kDsStages> ring;
  for (QuerySteps at = query_steps(params, tile); !at.done(); at.advance()) {
    const int stage = ring.stage;
    // Whoever wrote dS has waited for ds_empty, so the other block's copy of it is free as well.
    barriers.ds_full[stage].wait(ring.phase);
    barriers.peer_ds_full[stage].arrive_and_expect_tx(kBytes);  // of what comes from there
    const std::uint32_t from = cute::cast_smem_ptr_to_uint(shared.ds[stage]);
    const std::uint32_t to =
        cute::set_block_rank(cute::cast_smem_ptr_to_uint(shared.peer_ds[stage]), peer);
    const std::uint32_t full =
        cute::set_block_rank(cute::cast_smem_ptr_to_uint(&barriers.peer_ds_full[stage]), peer);
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        "[%0], [%1], %2, [%3];"
        :
        : "r"(to), "r"(from), "r"(kBytes), "r"(full)
        : "memory");
    ring.advance();
  }
}

}  // namespace hopper_attention
