// The producer: two warps that feed shared memory by TMA. One brings K and V, the other Q, so that
// the next tile's K and V need not wait until Q's buffer is free.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "forward/scheduler.cuh"
#include "hopper_attention/block_range.h"
#include "hopper_attention/config.h"

namespace hopper_attention {

template <class Traits>
CUTE_DEVICE BlockRange visited_blocks(ForwardParams const& params, WorkTile tile) {
  const int row_begin = tile.m_block * Traits::kConfig.tile_m();
  const int row_end = min(row_begin + Traits::kConfig.tile_m(), params.mask.seqlen_q);
  return key_blocks(params.mask, row_begin, row_end, Traits::kTileN);
}

// One tile of `rows` rows, slab by slab, into consecutive shared memory.
template <int kSlab, int kColumns, int kRows, class Element>
CUTE_DEVICE void load_tile(CUtensorMap const& map, FullBarrier& barrier,
                           cute::TMA::CacheHintSm90 hint, Element* shared, int row, int head,
                           int batch) {
  barrier.arrive_and_expect_tx(kRows * kColumns * sizeof(Element));
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier),
                                 static_cast<std::uint64_t>(hint), shared + column * kRows, column,
                                 row, head, batch);
  }
}

// V's loads in 16 bits: rows of tokens, as they lie in memory.
template <class Traits>
struct ValueLoader {
  Ring<Traits::kStages> ring;

  CUTE_DEVICE void load(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        int n_block, int head, int batch) {
    auto& barriers = shared.barriers;
    barriers.v_empty[ring.stage].wait(ring.phase ^ 1);
    load_tile<Traits::kSlabV, Traits::kHeadDimV, Traits::kTileN>(
        params.v, barriers.v_full[ring.stage], cute::TMA::CacheHintSm90::EVICT_LAST,
        shared.v[ring.stage], n_block * Traits::kTileN, head, batch);
    ring.advance();
  }
};

// Draws tiles and loads their K and V, right to left; V one block behind K, as they are consumed.
template <class Traits, class Values>
CUTE_DEVICE void produce_keys_values(ForwardParams const& params,
                                     typename Traits::SharedStorage& shared) {
  auto& barriers = shared.barriers;
  Ring<Traits::kStages> k_ring;
  Values values;
  auto load_k = [&](int n_block, int head, int batch) {
    barriers.k_empty[k_ring.stage].wait(k_ring.phase ^ 1);
    load_tile<Traits::kSlab, Traits::kHeadDim, Traits::kTileN>(
        params.k, barriers.k_full[k_ring.stage], cute::TMA::CacheHintSm90::EVICT_LAST,
        shared.k[k_ring.stage], n_block * Traits::kTileN, head, batch);
    k_ring.advance();
  };

  TileSource<Traits> source;
  int work_idx = blockIdx.x;
  while (work_idx < params.order.num_tiles()) {
    source.publish(barriers, work_idx);
    const WorkTile tile = params.order(work_idx);
    const BlockRange blocks = visited_blocks<Traits>(params, tile);
    if (!blocks.empty()) {
      const int head = tile.head / params.heads_per_kv;
      load_k(blocks.end - 1, head, tile.batch);
      for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
        load_k(n_block, head, tile.batch);
        values.load(params, shared, n_block + 1, head, tile.batch);
      }
      values.load(params, shared, blocks.begin, head, tile.batch);
    }
    // As late as the loads allow: a tile drawn a whole tile ahead would go to the block that is at
    // its longest one, and the longest tiles would pair up (4% of a causal run at 16k).
    work_idx = source.draw(params, work_idx);
  }
  source.publish(barriers, kNoMoreTiles);
  source.finish(params);
}

// Loads each consumer's rows of Q. Q comes for a tile without keys too: its O may lie on Q's
// buffer.
template <class Traits>
CUTE_DEVICE void produce_queries(ForwardParams const& params,
                                 typename Traits::SharedStorage& shared) {
  auto& barriers = shared.barriers;
  TileSink<Traits> sink;
  std::uint32_t phase = 0;
  for (int work_idx = sink.next(barriers); work_idx != kNoMoreTiles;
       work_idx = sink.next(barriers)) {
    const WorkTile tile = params.order(work_idx);
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      barriers.q_empty[consumer].wait(phase ^ 1);
      if (cute::elect_one_sync()) {
        load_tile<Traits::kSlab, Traits::kHeadDim, kConsumerRows>(
            params.q, barriers.q_full[consumer], cute::TMA::CacheHintSm90::EVICT_FIRST,
            shared.q[consumer], tile.m_block * Traits::kConfig.tile_m() + consumer * kConsumerRows,
            tile.head, tile.batch);
      }
      __syncwarp();
    }
    phase ^= 1;
  }
}

}  // namespace hopper_attention
