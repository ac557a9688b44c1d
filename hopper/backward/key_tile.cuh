// Which keys a tile has: arithmetic, but in packed batches a list that was made on the device.
// Dense batches with a soft cap run in the same kernels.
#pragma once

#include "backward/load.cuh"
#include "backward/traits.cuh"

namespace hopper_attention {

// This thread's place in its warp, of which nothing is kept.
CUTE_DEVICE int lane_anew() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Writes the tile of the list, whose groups follow one another, and which has an entry for all
// kCluster blocks of a cluster; by a whole warp. Its head_kv is negative where there are not as
// many.
template <int kCluster>
CUTE_DEVICE void write_listed_tile(KeyList const& list, int index, SharedTile& tile) {
  const PackedOrder& order = list.order;
  const int work_idx = index / kCluster, lane = lane_anew();
  const int end = lane < order.num_groups ? __ldcg(list.header->group_end + lane) : 0;
  const bool behind = lane < order.num_groups && work_idx >= end * order.heads;
  const int group = __popc(__ballot_sync(0xffffffff, behind));
  const int group_begin = group == 0 ? 0 : __shfl_sync(0xffffffff, end, group - 1);
  const int group_end = __shfl_sync(0xffffffff, end, group % 32);
  if (lane > 0) return;
  tile.head_kv = -1;
  if (group == order.num_groups) return;
  const PackedOrder::Work work =
      order(work_idx - group_begin * order.heads, group_end - group_begin);
  const auto* words = reinterpret_cast<const int4*>(list.entries + group_begin + work.entry);
  tile.head_kv = work.head;
  tile.wrap = kRaggedRows;
  const int4 block = __ldcg(words), keys = __ldcg(words + 1);
  const KeyEntry entry{block.x, block.y, block.z, block.w, keys.x, keys.y, keys.z, 0};
  tile.n_block = entry.n_block * kCluster + index % kCluster;
  tile.first_block = entry.first_block;
  tile.q = ragged_origin(entry.q_begin, entry.seqlen_q);
  tile.k = ragged_origin(entry.k_begin, entry.seqlen_k);
  tile.dk = ragged_origin(entry.k_begin, entry.keys);
  tile.seqlen_q = entry.seqlen_q;
  tile.seqlen_k = entry.seqlen_k;
}

// Writes the index-th tile, but for what persistent blocks have ready; likewise.
template <class Traits>
CUTE_DEVICE void write_tile(BackwardParams const& params, int index, SharedTile& tile) {
  if (Traits::kRagged && !(Traits::kCapped && params.list.entries == nullptr)) {
    write_listed_tile<Traits::kCluster>(params.list, index, tile);
  } else if (threadIdx.x % 32 == 0) {
    tile.head_kv = -1;
    if (index / Traits::kCluster >= params.order.num_tiles()) return;
    const KeyTile found = key_tile<Traits>(params, index);
    const int heads = params.order.heads * params.heads_per_kv;
    tile.n_block = found.n_block;
    tile.head_kv = found.head_kv;
    tile.first_block = found.batch * heads * params.num_m_blocks;
    tile.wrap = 0;
    tile.q = tile.k = tile.dk = found.k;
    tile.seqlen_q = params.mask.seqlen_q;
    tile.seqlen_k = params.mask.seqlen_k;
  }
}

CUTE_DEVICE SharedTile load_tile(SharedTile const& tile) {
  const int4 a = load_tile_words(tile, 0), b = load_tile_words(tile, 1);
  const int4 c = load_tile_words(tile, 2);
  return {a.x, a.y, a.z, a.w, {b.x, b.y}, {b.z, b.w}, {c.x, c.y}, c.z, c.w, {0, 0}, 0, 0};
}

// The mask of the tile's sequence.
template <class Traits>
CUTE_DEVICE Mask tile_mask(BackwardParams const& params,
                           typename Traits::SharedStorage const& shared, int slot = 0) {
  if constexpr (Traits::kRagged) {
    const int4 words = load_tile_words(shared.tile[slot], 2);
    return sequence_mask(params.mask, words.z, words.w);
  } else {
    return params.mask;
  }
}

// The ragged tile of a block that has one. head_kv is negative where it has nothing to do.
template <class Traits>
CUTE_DEVICE KeyTile own_tile(BackwardParams const& params,
                             typename Traits::SharedStorage const& shared) {
  const SharedTile tile = load_tile(shared.tile[0]);
  const Mask mask = sequence_mask(params.mask, tile.seqlen_q, tile.seqlen_k);
  return {tile.n_block,
          tile.head_kv,
          0,
          tile_query_blocks(mask, tile.n_block / Traits::kCluster, Traits::kTileM,
                            Traits::kCluster * Traits::kTileN),
          tile.first_block,
          tile.q,
          tile.k,
          tile.wrap};
}

}  // namespace hopper_attention
