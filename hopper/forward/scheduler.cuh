// How a persistent block gets its tiles: one producer thread draws them, everyone else is told.
#pragma once

#include "forward/cluster.cuh"
#include "forward/params.h"
#include "forward/traits.cuh"

namespace hopper_attention {

CUTE_DEVICE constexpr TileMessage no_more_tiles() { return {{0, 0, 0}, -1}; }

// The drawing side. Without a mask all tiles cost the same and block b takes b, b + grid, ...; of
// clusters, each takes a group of tiles for each of its blocks. With a mask, a global counter hands
// out the next tile (longest first), and the last block to find none left resets it for the next
// launch.
template <class Traits>
struct TileSource {
  Ring<Traits::kTileSlots> slot;

  CUTE_DEVICE int start(ForwardParams const& params) const {
    return blockIdx.x / cluster_blocks<Traits>(params);
  }
  CUTE_DEVICE bool has(ForwardParams const& params, int work_idx) const {
    return work_idx < params.order.num_tiles();
  }
  CUTE_DEVICE TileMessage find(ForwardParams const& params, int work_idx) const {
    const WorkTile tile =
        cluster_tile(params.order, work_idx, cluster_blocks<Traits>(params), blockIdx.x);
    return {tile, tile.head / params.heads_per_kv};
  }

  CUTE_DEVICE int draw(ForwardParams const& params, int current) const {
    if constexpr (!Traits::kMasked) return current + gridDim.x / cluster_blocks<Traits>(params);
    const int next = gridDim.x + atomicAdd(&params.counters[0], 1u);
    return next;
  }

  CUTE_DEVICE void publish(typename Traits::Barriers& barriers, TileMessage const& tile) {
    barriers.tile_empty[slot.stage].wait(slot.phase ^ 1);
    barriers.tiles[slot.stage] = tile;
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

// The receiving side, called by whole warps: every tile is released once.
template <class Traits>
struct TileSink {
  Ring<Traits::kTileSlots> slot;

  // Waits for the next tile; false when there is none.
  CUTE_DEVICE bool next(typename Traits::Barriers& barriers) {
    barriers.tile_full[slot.stage].wait(slot.phase);
    return tile(barriers).head_kv >= 0;
  }

  // Whether there is a tile after the current one, which stays the current one.
  CUTE_DEVICE bool has_next(typename Traits::Barriers& barriers) const {
    TileSink following = *this;
    following.slot.advance();
    return following.next(barriers);
  }

  // The current tile, from shared memory each time: registers are what is short.
  CUTE_DEVICE TileMessage tile(typename Traits::Barriers& barriers) const {
    TileMessage message;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(message.tile.m_block), "=r"(message.tile.head), "=r"(message.tile.batch),
                   "=r"(message.head_kv)
                 : "r"(cute::cast_smem_ptr_to_uint(&barriers.tiles[slot.stage])));
    return message;
  }

  // Likewise its sequence and that one's mask, in packed batches alone.
  CUTE_DEVICE TileSequence sequence(typename Traits::Barriers& barriers) const {
    TileSequence sequence;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(sequence.q_begin), "=r"(sequence.rows), "=r"(sequence.seqlen_q),
                   "=r"(sequence.seqlen_k)
                 : "r"(cute::cast_smem_ptr_to_uint(&barriers.sequences[slot.stage])));
    return sequence;
  }

  CUTE_DEVICE Mask mask(ForwardParams const& params, typename Traits::Barriers& barriers) const {
    const TileSequence current = sequence(barriers);
    return sequence_mask(params.mask, current.seqlen_q, current.seqlen_k);
  }

  CUTE_DEVICE void release(typename Traits::Barriers& barriers) {
    __syncwarp();
    arrive_warp(barriers.tile_empty[slot.stage]);
    slot.advance();
  }
};

}  // namespace hopper_attention
