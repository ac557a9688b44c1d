// The producer's part that is packed batches' own: tiles from a list in memory, and V whose last
// rows belong to the next sequence.
#pragma once

#include <cutlass/arch/barrier.h>

#include "forward/load.cuh"

namespace hopper_attention {

// Where a block's first tile waits until the producer takes it: a slot that comes into use with the
// second.
inline constexpr int kStartSlot = kTileSlots - 1;

// The tile that this block begins with, found without the list; one without rows where there is
// none.
template <class Traits>
CUTE_DEVICE void find_start(ForwardParams const& params, typename Traits::Barriers& barriers) {
  const PackedParams& packed = params.packed;
  const int idx = blockIdx.x / packed.start.heads, head = blockIdx.x % packed.start.heads;
  TileEntry entry{};
  if (idx < packed.start.entries) {
    entry = start_entry(packed.lengths, packed.order, Traits::kConfig.tile_m(), idx);
  }
  barriers.tiles[kStartSlot] = {{entry.m_block, head, entry.k_begin}, head / params.heads_per_kv};
  barriers.sequences[kStartSlot] = entry.sequence;
}

// Draws from the list that launch_list_tiles makes meanwhile, in place of TileOrder's arithmetic.
template <class Traits>
struct PackedTileSource : TileSource<Traits> {
  int group = 0;  // of sequences: the one with the tile that was drawn last; past the end, none
  int group_begin = 0;
  int group_end;  // read anew with each draw, as registers are short

  CUTE_DEVICE int start(ForwardParams const&) const { return -1; }  // the tile of find_start

  CUTE_DEVICE bool has(ForwardParams const& params, int) const {
    return group < params.packed.order.num_groups;
  }

  CUTE_DEVICE DrawnTile find(ForwardParams const& params, typename Traits::Barriers const& barriers,
                             int work_idx) const {
    if (work_idx < 0) {
      const TileMessage& message = barriers.tiles[kStartSlot];
      return {message, barriers.sequences[kStartSlot], message.tile.batch};
    }
    const PackedOrder& order = params.packed.order;
    const PackedOrder::Work work =
        order(work_idx - group_begin * order.heads, group_end - group_begin);
    const auto* words =
        reinterpret_cast<const int4*>(params.packed.entries + group_begin + work.entry);
    const int4 tile = __ldcg(words), sequence = __ldcg(words + 1);
    return {{{tile.x, work.head, tile.z}, work.head / params.heads_per_kv},
            {sequence.x, sequence.y, sequence.z, sequence.w},
            tile.z};
  }

  CUTE_DEVICE Mask mask(ForwardParams const& params, DrawnTile const& tile) const {
    return sequence_mask(params.mask, tile.sequence.seqlen_q, tile.sequence.seqlen_k);
  }

  CUTE_DEVICE int draw(ForwardParams const& params, int) {
    asm volatile("griddepcontrol.wait;" ::: "memory");  // until the list is written
    const PackedOrder& order = params.packed.order;
    PackedHeader* const header = params.packed.header;
    group_end = __ldcg(header->group_end + group);  // comes while the counter does
    const int work_idx = params.packed.start.tiles() + atomicAdd(&header->next_tile, 1u);
    while (work_idx >= group_end * order.heads && ++group < order.num_groups) {
      group_begin = group_end;
      group_end = __ldcg(header->group_end + group);
    }
    return work_idx;
  }

  // From its slot, which nobody fills before this tile's end: registers are short.
  CUTE_DEVICE DrawnTile published(typename Traits::Barriers const& barriers,
                                  DrawnTile const&) const {
    const int stage = kTileSlots - 1 - this->slot.stage;
    const TileMessage& message = barriers.tiles[stage];
    return {message, barriers.sequences[stage], message.tile.batch};
  }

  CUTE_DEVICE void finish(ForwardParams const&) const {}  // the next list begins a new count
};

// V's loads in 16 bits. A sequence's last block arrives at a barrier of its own where it is not
// whole: what lies behind the sequence is its neighbour's, and 0 * NaN is NaN.
template <class Traits>
struct PackedValueLoader {
  Ring<Traits::kStages> ring;
  int k_begin;
  int seqlen_k;

  CUTE_DEVICE void start_tile(DrawnTile const& tile) {
    k_begin = tile.k_begin;
    seqlen_k = tile.sequence.seqlen_k;
  }

  CUTE_DEVICE void load(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        int n_block, int head, int batch) {
    auto& barriers = shared.barriers;
    barriers.v_empty[ring.stage].wait(ring.phase ^ 1);
    const int first_key = n_block * Traits::kTileN;
    const bool whole = first_key + Traits::kTileN <= seqlen_k;
    load_tile<Traits::kSlabV, Traits::kHeadDimV, Traits::kTileN>(
        params.v, whole ? barriers.v_full[ring.stage] : barriers.v_tail[ring.stage],
        cute::TMA::CacheHintSm90::EVICT_LAST, shared.v[ring.stage], k_begin + first_key, head,
        batch);
    ring.advance();
  }
};

// Rows first_row and on of a block of V. A swizzle moves nothing out of its row.
template <class Traits>
CUTE_DEVICE void clear_value_rows(typename Traits::Element* block, int first_row) {
  constexpr int kRowChunks = Traits::kSlabV * sizeof(typename Traits::Element) / sizeof(uint4);
  constexpr int kSlabChunks = Traits::kTileN * kRowChunks;
  auto* chunks = reinterpret_cast<uint4*>(block);
  for (int slab = 0; slab < Traits::kHeadDimV / Traits::kSlabV; ++slab) {
    for (int i = first_row * kRowChunks + threadIdx.x % 32; i < kSlabChunks; i += 32) {
      chunks[slab * kSlabChunks + i] = uint4{0, 0, 0, 0};
    }
  }
}

// One warp: follows the tiles, clears the rows of V behind a sequence's end and passes the block
// on. Each stage has its own barrier: the last blocks of two short sequences may wait at once.
template <class Traits>
CUTE_DEVICE void clear_last_values(ForwardParams const& params,
                                   typename Traits::SharedStorage& shared) {
  auto& barriers = shared.barriers;
  TileSink<Traits> sink;
  int stage = 0;
  unsigned phases = 0;  // of v_tail, a bit a stage
  while (sink.next(barriers)) {
    const Mask mask = sink.mask(params, barriers);
    const BlockRange blocks = visited_blocks<Traits>(mask, sink.tile(barriers).tile);
    sink.release(barriers);
    if (blocks.end * Traits::kTileN > mask.seqlen_k) {
      barriers.v_tail[stage].wait(phases >> stage & 1);
      phases ^= 1u << stage;
      const int first_row = max(mask.seqlen_k - (blocks.end - 1) * Traits::kTileN, 0);
      clear_value_rows<Traits>(shared.v[stage], first_row);
      cutlass::arch::fence_view_async_shared();  // WGMMA reads what ordinary stores wrote
      __syncwarp();
      if (cute::elect_one_sync()) barriers.v_full[stage].arrive();
    }
    stage = (stage + blocks.end - blocks.begin) % Traits::kStages;
  }
}

}  // namespace hopper_attention
