// How a persistent block gets its tiles: one producer thread draws them, everyone else is told.
#pragma once

#include "common/barriers.cuh"
#include "forward/params.h"
#include "hopper_attention/budget.h"

namespace hopper_attention {

inline constexpr int kNoMoreTiles = -1;

// The drawing side. Without a mask all tiles cost the same and block b takes b, b + grid, ...; with
// one, a global counter hands out the next tile (longest first), and the last block to find none
// left resets it for the next launch.
template <class Traits>
struct TileSource {
  Ring<kTileSlots> slot;

  CUTE_DEVICE int draw(ForwardParams const& params, int current) const {
    if constexpr (!Traits::kMasked) return current + gridDim.x;
    const int next = gridDim.x + atomicAdd(&params.counters[0], 1u);
    return next;
  }

  CUTE_DEVICE void publish(typename Traits::Barriers& barriers, int work_idx) {
    barriers.tile_empty[slot.stage].wait(slot.phase ^ 1);
    barriers.tile_idx[slot.stage] = work_idx;
    barriers.tile_full[slot.stage].arrive();
    slot.advance();
  }

  // Every block draws past the end exactly once; after the last one nobody reads the counters.
  CUTE_DEVICE void finish(ForwardParams const& params) const {
    if constexpr (Traits::kMasked) {
      __threadfence();
      if (atomicAdd(&params.counters[1], 1u) == gridDim.x - 1) {
        params.counters[0] = 0;
        params.counters[1] = 0;
      }
    }
  }
};

// The receiving side, called by whole warps.
template <class Traits>
struct TileSink {
  Ring<kTileSlots> slot;

  CUTE_DEVICE int next(typename Traits::Barriers& barriers) {
    barriers.tile_full[slot.stage].wait(slot.phase);
    const int work_idx = barriers.tile_idx[slot.stage];
    __syncwarp();
    arrive_warp(barriers.tile_empty[slot.stage]);
    slot.advance();
    return work_idx;
  }
};

}  // namespace hopper_attention
