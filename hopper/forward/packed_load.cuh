// The producer's part that is packed batches' own: tiles from a list in memory, and V whose last
// rows belong to the next sequence.
#pragma once

#include <cutlass/arch/barrier.h>

#include "forward/load.cuh"

namespace hopper_attention {

// A Ring in one register.
template <int kStages>
struct CountedRing {
  static_assert((kStages & (kStages - 1)) == 0, "the count may overflow");
  unsigned count = 0;

  CUTE_DEVICE unsigned stage() const { return count % kStages; }
  CUTE_DEVICE unsigned phase() const { return count / kStages & 1; }
  CUTE_DEVICE void advance() { ++count; }
};

// The tile that this block begins with, found without the list, in the slot of the first; one
// without rows where there is none.
template <class Traits>
CUTE_DEVICE void find_start(ForwardParams const& params, typename Traits::Barriers& barriers) {
  const PackedParams& packed = params.packed;
  const int idx = blockIdx.x / packed.start.heads, head = blockIdx.x % packed.start.heads;
  TileEntry entry{};
  if (idx < packed.start.entries) {
    entry = start_entry(packed.lengths, packed.order, Traits::kConfig.tile_m(), idx);
  }
  barriers.tiles[0] = {{entry.m_block, head, entry.k_begin}, head / params.heads_per_kv};
  barriers.sequences[0] = entry.sequence;
}

// A tile and its sequence. Its `batch` is the first row of the sequence's K and V.
struct PackedTile {
  TileMessage message;
  TileSequence sequence;
};

// Draws from the list that launch_list_tiles makes meanwhile, in place of TileOrder's arithmetic.
template <class Traits>
struct PackedTileSource {
  CountedRing<Traits::kTileSlots> slot;
  PackedWalk walk;

  CUTE_DEVICE void publish_start(typename Traits::Barriers& barriers) {
    barriers.tile_full[0].arrive();
    slot.advance();
  }

  CUTE_DEVICE void publish_next(ForwardParams const& params, typename Traits::Barriers& barriers) {
    asm volatile("griddepcontrol.wait;" ::: "memory");  // until the list is written
    const PackedParams& packed = params.packed;
    const auto group_end = [&](int group) { return __ldcg(packed.header->group_end + group); };
    // These come while the counter does.
    const int begin = walk.group > 0 ? group_end(walk.group - 1) : 0, end = group_end(walk.group);
    const int work_idx = packed.start.tiles() + atomicAdd(&packed.header->next_tile, 1u);
    const PackedOrder::Work work =
        walk(packed.order, packed.divides, work_idx, begin, end, group_end);
    PackedTile drawn{no_more_tiles(), {}};
    if (walk.group < packed.order.num_groups) {
      const auto* words = reinterpret_cast<const int4*>(packed.entries + work.entry);
      const int4 tile = __ldcg(words), sequence = __ldcg(words + 1);
      drawn.message = {{tile.x, work.head, tile.z},
                       packed.divides.by_heads_per_kv.quotient(work.head)};
      drawn.sequence = {sequence.x, sequence.y, sequence.z, sequence.w};
    }
    const unsigned stage = slot.stage();
    barriers.tile_empty[stage].wait(slot.phase() ^ 1);
    barriers.tiles[stage] = drawn.message;
    barriers.sequences[stage] = drawn.sequence;
    barriers.tile_full[stage].arrive();
    slot.advance();
  }

  // From its slot, the tile that was published last, or the one before that: nobody can have
  // released it as long as its V is not all there.
  CUTE_DEVICE PackedTile published(typename Traits::Barriers const& barriers,
                                   int before = 0) const {
    const unsigned stage = (slot.count - 1 - before) % Traits::kTileSlots;
    return {barriers.tiles[stage], barriers.sequences[stage]};
  }
};

// produce_keys_values of packed batches: loads and draws in the same order.
//
// A sequence's last block of V arrives at a barrier of its own where it is not whole: what lies
// behind the sequence is its neighbour's, and 0 * NaN is NaN.
template <class Traits>
CUTE_DEVICE void produce_packed(ForwardParams const& params,
                                typename Traits::SharedStorage& shared) {
  constexpr auto kHint = cute::TMA::CacheHintSm90::EVICT_LAST;
  constexpr int kTileN = Traits::kTileN;
  auto& barriers = shared.barriers;
  CountedRing<Traits::kStages> k_ring, v_ring;
  std::uint32_t o_phase = 0;
  auto wait_for_o = [&] {  // once a tile, ahead of its first V: as in produce_keys_values
    if constexpr (Traits::kOOnV) {
      for (int i = 0; i < Traits::kConsumers; ++i) barriers.o_sent[i].wait(o_phase ^ 1);
      o_phase ^= 1;
    }
  };
  auto load_v = [&](TileMessage const& tile, int n_block, int partial) {
    const unsigned stage = v_ring.stage();
    barriers.v_empty[stage].wait(v_ring.phase() ^ 1);
    load_tile<Traits::kSlabV, Traits::kHeadDimV, kTileN>(
        params.v, n_block == partial ? barriers.v_tail[stage] : barriers.v_full[stage], kHint,
        shared.v[stage], tile.tile.batch + n_block * kTileN, tile.head_kv, 0);
    v_ring.advance();
  };
  PackedTileSource<Traits> source;
  source.publish_start(barriers);
  for (;;) {
    const PackedTile drawn = source.published(barriers);
    const TileMessage tile = drawn.message;
    if (tile.head_kv < 0) return;
    const int seqlen_k = drawn.sequence.seqlen_k;
    const BlockRange blocks = visited_blocks<Traits>(
        sequence_mask(params.mask, drawn.sequence.seqlen_q, seqlen_k), tile.tile);
    const int partial = blocks.end * kTileN > seqlen_k ? blocks.end - 1 : -1;  // a block, or none
    auto load_k = [&](int n_block) {
      const unsigned stage = k_ring.stage();
      barriers.k_empty[stage].wait(k_ring.phase() ^ 1);
      load_tile<Traits::kSlab, Traits::kHeadDim, kTileN>(
          params.k, barriers.k_full[stage], kHint, shared.k[stage],
          tile.tile.batch + n_block * kTileN, tile.head_kv, 0);
      k_ring.advance();
    };
    if (!blocks.empty()) load_k(blocks.end - 1);
    CUTE_NO_UNROLL  // registers are short
    for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
      load_k(n_block);
      if (n_block == blocks.end - 2) wait_for_o();
      load_v(tile, n_block + 1, partial);
    }
    if (blocks.end - blocks.begin < 2) wait_for_o();
    if constexpr (!Traits::kConfig.ahead_first) {
      if (!blocks.empty()) load_v(tile, blocks.begin, partial);
      source.publish_next(params, barriers);
    } else {
      source.publish_next(params, barriers);
      const PackedTile own = source.published(barriers, 1);  // registers are short
      const bool whole = (blocks.begin + 1) * kTileN <= own.sequence.seqlen_k;
      load_v(own.message, blocks.begin, whole ? -1 : blocks.begin);
    }
  }
}

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
