// Clusters: two blocks with neighbouring query tiles of one head go through the same keys side by
// side, and L2 is read once for both: one of them loads K for both, the other one V (TMA
// multicast).
//
// Buffers, barriers and loops are each block's own, as without a cluster. Its producer waits until
// its buffer is free and has its own full barrier expect the bytes; then it sends word to the block
// that loads, or is that block, waits for the other's word, and loads for both. Both producers take
// the same steps in the same order, so neither can wait for a step that is behind the other's own.
//
// A last tile whose rows are all past the end is worked through like any other: TMA reads zeros for
// it and writes nothing. Requests whose tiles make no pairs run with params.cluster = 1.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "common/barriers.cuh"
#include "forward/params.h"

namespace hopper_attention {

// Ranks within the cluster.
inline constexpr int kKeyLoader = 0;
inline constexpr int kValueLoader = 1;

// Blocks of this launch that work through neighbouring tiles side by side.
template <class Traits>
CUTE_DEVICE int cluster_blocks(ForwardParams const& params) {
  if constexpr (Traits::kCluster == 1) return 1;
  return params.cluster;
}

// Where this block's buffer is free and its full barrier expects the bytes: waits for the same of
// the other block and returns true, where this one loads. ready: counts one arrival.
template <class Traits>
CUTE_DEVICE bool meet(EmptyBarrier& ready, std::uint32_t phase, int loader) {
  if (static_cast<int>(blockIdx.x % Traits::kCluster) != loader) {
    ready.arrive(loader);  // at the other block's
    return false;
  }
  ready.wait(phase);
  return true;
}

// Once this block's barriers are there: before anything arrives from the other block.
template <class Traits>
CUTE_DEVICE void sync_start() {
  if constexpr (Traits::kCluster == 1) {
    __syncthreads();
  } else {
    cute::cluster_sync();
  }
}

// A block must last while the other one arrives at its barriers or loads for it: one warp of each
// stays until all other threads of both have gone, for the cluster's barrier waits for no thread
// that has.
template <class Traits>
CUTE_DEVICE void stay_until_cluster_is_done() {
  if constexpr (Traits::kCluster > 1) cute::cluster_sync();
}

}  // namespace hopper_attention
