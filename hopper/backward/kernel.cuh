// The main backward kernel: tiles of keys, a block one or one after another; one producer warpgroup
// and two or three consumers.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "backward/epilogue.cuh"

namespace hopper_attention {

// A block's start, one thread of each of the producer's warps a part of it: what they do takes
// hundreds of cycles, one after the other.
template <class Traits>
CUTE_DEVICE void start_block(BackwardParams const& params, typename Traits::Barriers& barriers,
                             int warp) {
  constexpr int kConsumerWarps = Traits::kConsumers * kWarpgroupWarps;
  if (warp == 0) {  // what the producer's own copies need
    for (int i = 0; i < Traits::kTileSlots; ++i) {
      barriers.k_full[i].init(1);
      barriers.v_full[i].init(1);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      barriers.q_full[i].init(1);
      barriers.q_empty[i].init(kConsumerWarps);
    }
    for (int i = 0; i < Traits::kDoutStages; ++i) {
      barriers.dout_full[i].init(1);
      barriers.dout_empty[i].init(kConsumerWarps);
    }
  } else if (warp == 1) {
    for (int i = 0; i < Traits::kDsStages; ++i) {
      barriers.ds_full[i].init(Traits::kClustered ? kWarpgroupWarps : kConsumerWarps);
      barriers.ds_empty[i].init(Traits::kCluster * kConsumerWarps);
      if constexpr (Traits::kClustered) barriers.peer_ds_full[i].init(1);
    }
    barriers.p_full.init(kWarpgroupWarps);
    barriers.p_empty.init(kWarpgroupWarps);
    for (int i = 0; i < Traits::kConsumers; ++i) {
      barriers.dq_full[i].init(kWarpgroupWarps);
      barriers.dq_empty[i].init(1);
    }
  } else if (warp == 2) {
    cute::prefetch_tma_descriptor(&params.k);
    cute::prefetch_tma_descriptor(&params.q);
    cute::prefetch_tma_descriptor(&params.v);
    cute::prefetch_tma_descriptor(&params.dout);
  } else if constexpr (Traits::kAlike) {
    // The storing warp, and those that see to the adds.
    const bool ordered = params.workspace.turns != nullptr;
    const int releases = 1 + (ordered ? kKeepers : Traits::kDqBulk ? 1 : 0);
    for (int i = 0; i < Traits::kTileSlots; ++i) {
      barriers.tile_full[i].init(1);
      barriers.tile_empty[i].init(releases);
      barriers.gradients_full[i].init(kConsumerWarps);
    }
    barriers.v_empty[0].init(kConsumerWarps);
    barriers.gradients_read[0].init(1);
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
CUTE_DEVICE auto make_dk() {
  using Shape = cute::Shape<typename Traits::N, typename Traits::D>;
  return cute::partition_fragment_C(typename Traits::MmaDk{}, Shape{});
}
template <class Traits>
CUTE_DEVICE auto make_dv() {
  using Shape = cute::Shape<typename Traits::N, typename Traits::Dv>;
  return cute::partition_fragment_C(typename Traits::MmaDv{}, Shape{});
}

// kScores: the consumer has the scores of some keys, else it has dQ.
template <class Traits, bool kScores>
CUTE_DEVICE void consume_third(BackwardParams const& params, KeyTile const& tile,
                               typename Traits::SharedStorage& shared, int consumer, int thread) {
  constexpr int kWithValues = gradient_parts(Traits::kConfig, Traits::kHeadDimV);
  constexpr bool kValues = kScores || kWithValues == Traits::kConsumers;
  auto rdK = make_part_gradient<Traits, false>();
  auto rdV = make_part_gradient<Traits, true>();
  if constexpr (kScores) {
    accumulate_scores_third<Traits>(params, tile, shared, consumer, thread, rdK, rdV);
  } else {
    accumulate_dq_third<Traits, kValues>(params, tile, shared, consumer, thread, rdK, rdV);
  }
  sync_consumers(Traits::kConsumers);
  if constexpr (kValues) store_part<Traits, true>(params, tile, shared, consumer, thread, rdV);
  store_part<Traits, false>(params, tile, shared, consumer, thread, rdK);
}

template <class Traits>
CUTE_DEVICE void consume(BackwardParams const& params, KeyTile const& tile,
                         typename Traits::SharedStorage& shared, int consumer) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  if constexpr (Traits::kThirds) {
    if (consumer < kScorers) {
      consume_third<Traits, true>(params, tile, shared, consumer, thread);
    } else {
      consume_third<Traits, false>(params, tile, shared, consumer, thread);
    }
  } else if (consumer == 0) {
    auto rdV = make_dv<Traits>();
    accumulate_values<Traits>(params, tile, shared, thread, rdV);
    sync_consumers(Traits::kConsumers);
    store_dv<Traits>(params, tile, shared, thread, rdV);
  } else {
    auto rdK = make_dk<Traits>();
    accumulate_cluster_keys<Traits>(params, tile, shared, thread, rdK);
    sync_consumers(Traits::kConsumers);
    store_dk<Traits>(params, tile, shared, thread, rdK);
  }
  if (thread == 0) cute::tma_store_wait<0>();  // shared memory lives until TMA has read it
}

// One of the producer's warps that see to dQ's adds, as far as the consumers do not.
template <class Traits, class Tiles>
CUTE_DEVICE void add_in_background(BackwardParams const& params, Tiles const& tiles,
                                   typename Traits::SharedStorage& shared, int keeper) {
  if (params.workspace.turns == nullptr) {
    if (Traits::kDqBulk && keeper == 0) {
      if (cute::elect_one_sync()) add_dq<Traits>(params, tiles, shared);
    }
  } else if constexpr (Traits::kDqBulk) {
    add_dq_in_turn<Traits>(params, tiles, shared, keeper);
  } else {
    keep_turns<Traits>(params, tiles, shared, keeper);
  }
}

// Before anything arrives from the other block of a cluster.
template <class Traits>
CUTE_DEVICE void meet_cluster() {
  if constexpr (Traits::kClustered) {
    cute::cluster_sync();
  } else {
    __syncthreads();
  }
}

// What a block does whose consumers share its keys.
template <class Traits>
CUTE_DEVICE void run_tile(BackwardParams const& params, KeyTile const& tile,
                          typename Traits::SharedStorage& shared, int warpgroup) {
  if constexpr (Traits::kRagged) {
    if (tile.head_kv < 0) return;
  }
  constexpr RegisterSplit kSplit = register_split(Traits::kConsumers);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kSplit.producer>();
    const int warp = cutlass::canonical_warp_idx_sync();
    if (warp == 0) {
      QueryRings<Traits> rings;
      if (cute::elect_one_sync()) produce<Traits>(params, tile, shared, 0, rings);
      __syncwarp();
      if constexpr (Traits::kClustered && Traits::kEarlyLoads) cute::cluster_wait();
    } else if (Traits::kClustered && warp > kKeepers) {
      if (cute::elect_one_sync()) send_ds<Traits>(params, tile, shared);
      __syncwarp();
      // A block must be there while the other one writes into its shared memory: this warp stays
      // until all other threads of both have gone, which the barrier counts like arrivals.
      cute::cluster_sync();
    } else if (warp <= kKeepers) {
      add_in_background<Traits>(params, OneTile<Traits>{tile}, shared, warp - 1);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kSplit.consumer>();
    consume<Traits>(params, tile, shared, warpgroup - 1);
  }
}

// One of the producer's warps, where consumers are alike.
template <class Traits>
CUTE_DEVICE void serve(BackwardParams const& params, typename Traits::SharedStorage& shared,
                       int warp) {
  if (warp == 0) {
    produce_tiles<Traits>(params, shared);
  } else if (warp == kKeepers + 1) {
    if (cute::elect_one_sync()) store_gradients<Traits>(params, shared);
  } else {
    add_in_background<Traits>(params, AllTiles<Traits>{}, shared, warp - 1);
  }
}

template <class Traits>
CUTE_DEVICE void run_tiles(BackwardParams const& params, typename Traits::SharedStorage& shared,
                           int warpgroup) {
  constexpr RegisterSplit kSplit = register_split(Traits::kConsumers);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kSplit.producer>();
    serve<Traits>(params, shared, cutlass::canonical_warp_idx_sync());
  } else {
    cutlass::arch::warpgroup_reg_alloc<kSplit.consumer>();
    const int consumer = warpgroup - 1, thread = threadIdx.x % kWarpgroupThreads;
    const auto give = [&](KeyTile const& tile, int slot, auto& rdK, auto& rdV) {
      hand_over<Traits>(params, tile, shared, slot, consumer, thread, rdK, rdV);
    };
    if constexpr (Traits::kLateDq) {
      consume_late<Traits>(params, shared, consumer, thread, give);
    } else {
      consume_alike<Traits>(params, shared, consumer, thread, give);
    }
  }
}

template <class Instance>
__global__ void __launch_bounds__(BackwardTraits<Instance>::kThreads, 1)
    backward_kernel(__grid_constant__ const BackwardParams params) {
  using Traits = BackwardTraits<Instance>;
  extern __shared__ __align__(1024) unsigned char shared_bytes_begin[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes_begin);
  const int warp = cutlass::canonical_warp_idx_sync();
  let_next_start();
  if (warp < kWarpgroupWarps && cute::elect_one_sync()) {
    start_block<Traits>(params, shared.barriers, warp);
  }
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if constexpr (Traits::kAlike) {
    __syncthreads();
    wait_for_last_kernel();
    run_tiles<Traits>(params, shared, warpgroup);
  } else if constexpr (Traits::kRagged) {
    wait_for_last_kernel();
    if (warp == kWarpgroupWarps) write_tile<Traits>(params, blockIdx.x, shared.tile[0]);
    meet_cluster<Traits>();
    run_tile<Traits>(params, own_tile<Traits>(params, shared), shared, warpgroup);
  } else {
    // The tile's place takes divisions, which are done while others do the above.
    if constexpr (Traits::kClustered) cute::cluster_arrive();
    const KeyTile tile = key_tile<Traits>(params, blockIdx.x);
    if constexpr (Traits::kClustered) {
      // The producer's first copies need nobody else.
      if (warp > 0) cute::cluster_wait();
    } else {
      __syncthreads();
    }
    if (warp > 0) wait_for_last_kernel();
    run_tile<Traits>(params, tile, shared, warpgroup);
  }
}

}  // namespace hopper_attention
