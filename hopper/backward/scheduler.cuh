// How a persistent block gets its tiles: one of the producer's warps draws them, the others are
// told.
#pragma once

#include "backward/key_tile.cuh"

namespace hopper_attention {

// Which of a block's kSlots places a tile has, in one register: what follows from it is computed
// each time.
template <int kSlots>
struct TileSlot {
  unsigned int count = 0;

  CUTE_DEVICE int stage() const { return anew() % kSlots; }
  CUTE_DEVICE std::uint32_t phase() const { return anew() / kSlots % 2; }
  CUTE_DEVICE void advance() { ++count; }

 private:
  CUTE_DEVICE unsigned int anew() const {
    unsigned int same = count;
    asm volatile("" : "+r"(same));
    return same;
  }
};

// The drawing side, a whole warp. A tile is drawn when its block runs, and its block's tiles are
// done in the order in which they were drawn. So in a fixed order of the adds the tile with the
// lowest number that is not done never waits for long, however few blocks run: it waits for adds of
// tiles with lower numbers alone. Where a block's first tile is that of its own number, blocks that
// do not run yet might be waited for.
template <class Traits>
struct TileSource {
  CUTE_DEVICE int draw(BackwardParams const& params) const {
    unsigned int ticket = 0;
    if (lane_anew() == 0) ticket = atomicAdd(params.workspace.tickets, 1u);
    return static_cast<int>(__shfl_sync(0xffffffff, ticket, 0));
  }
  CUTE_DEVICE int first(BackwardParams const& params) const {
    if (!Traits::kPersistent || params.workspace.turns == nullptr) return blockIdx.x;
    return draw(params);
  }
  CUTE_DEVICE int next(BackwardParams const& params) const {
    const int ticket = draw(params);
    return params.workspace.turns == nullptr ? gridDim.x + ticket : ticket;
  }

  // Writes the index-th tile where the others will read it. What has been written is read again:
  // registers are short.
  CUTE_DEVICE void put(BackwardParams const& params, typename Traits::SharedStorage& shared,
                       int slot, int index) const {
    SharedTile& tile = shared.tile[slot];
    write_tile<Traits>(params, index, tile);
    __syncwarp();
    if (lane_anew() == 0) {
      const int4 words = load_tile_words(tile, 0);
      const BlockRange m_blocks = tile_query_blocks(tile_mask<Traits>(params, shared, slot),
                                                    words.x, Traits::kTileM, Traits::kTileN);
      const bool has_steps = words.y >= 0 && !m_blocks.empty();
      tile.m_blocks = m_blocks;
      tile.steps = has_steps ? (m_blocks.end - m_blocks.begin) * params.heads_per_kv : 0;
    }
    __syncwarp();
  }
};

// The receiving side. A tile is released once by each that counts (start_block).
template <class Traits>
struct TileSink {
  Ring<Traits::kTileSlots> slot;

  // Waits for the next tile; false when there is none.
  CUTE_DEVICE bool next(typename Traits::SharedStorage& shared) const {
    if (!Traits::kPersistent && slot.phase > 0) return false;
    shared.barriers.tile_full[slot.stage].wait(slot.phase);
    return load_tile_words(shared.tile[slot.stage], 0).y >= 0;
  }
  CUTE_DEVICE KeyTile tile(typename Traits::SharedStorage const& shared) const {
    return told_tile<Traits>(shared, slot.stage);
  }
  CUTE_DEVICE void release(typename Traits::SharedStorage& shared) {
    shared.barriers.tile_empty[slot.stage].arrive();
  }
};

// The tiles of a warp, in the order in which the block has them: each(work) calls
// work(tile, slot). Of a block that has one tile:
template <class Traits>
struct OneTile {
  KeyTile const& tile;

  template <class Work>
  CUTE_DEVICE void each(typename Traits::SharedStorage&, bool, Work work) const {
    work(tile, 0);
  }
};
// Of a persistent one. releases: whether this thread is the one that does; its warp is together
// when work returns.
template <class Traits>
struct AllTiles {
  template <class Work>
  CUTE_DEVICE void each(typename Traits::SharedStorage& shared, bool releases, Work work) const {
    for (TileSink<Traits> tiles; tiles.next(shared); tiles.slot.advance()) {
      work(tiles.tile(shared), tiles.slot.stage);
      if (releases) tiles.release(shared);
    }
  }
};

// Draws tiles, tells the others and loads what they need. A tile is drawn when all loads of the one
// before it have been issued, about two steps before that one's end.
template <class Traits>
CUTE_DEVICE void produce_tiles(BackwardParams const& params,
                               typename Traits::SharedStorage& shared) {
  auto& barriers = shared.barriers;
  const TileSource<Traits> source;
  TileSlot<Traits::kTileSlots> slot;
  QueryRings<Traits> rings;
  for (int index = source.first(params);; index = source.next(params)) {
    barriers.tile_empty[slot.stage()].wait(slot.phase() ^ 1);
    source.put(params, shared, slot.stage(), index);
    if (cute::elect_one_sync()) {  // the same thread every time
      barriers.tile_full[slot.stage()].arrive();
      if (load_tile_words(shared.tile[slot.stage()], 3).z > 0) {
        produce<Traits>(params, told_tile<Traits>(shared, slot.stage()), shared, slot.stage(),
                        rings);
      } else {  // every phase is seen
        if constexpr (Traits::kSharedValues) barriers.v_empty[0].wait(slot.stage() ^ 1);
        barriers.k_full[slot.stage()].arrive();
        barriers.v_full[slot.stage()].arrive();
      }
    }
    __syncwarp();
    if (!Traits::kPersistent || load_tile_words(shared.tile[slot.stage()], 0).y < 0) return;
    slot.advance();
  }
}

}  // namespace hopper_attention
