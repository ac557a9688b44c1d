// The producer: two warps that feed shared memory by TMA. One brings K and V, the other Q, so that
// the next tile's K and V need not wait until Q's buffer is free.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "forward/scheduler.cuh"
#include "hopper_attention/block_range.h"
#include "hopper_attention/config.h"

namespace hopper_attention {

template <class Traits>
CUTE_DEVICE BlockRange visited_blocks(Mask const& mask, WorkTile tile) {
  constexpr bool kNeverEmpty = never_empty(Traits::kConfig);
  if constexpr (Traits::kPacked) {
    const BlockRange blocks =
        tile_key_blocks(mask, tile.m_block, Traits::kConfig.tile_m(), Traits::kTileN);
    // As below; the neighbour's keys are masked, and its values cleared.
    const int past = all_key_blocks(mask, Traits::kTileN).end;
    return kNeverEmpty && blocks.empty() ? BlockRange{past, past + 1} : blocks;
  }
  // A cluster's last tile may have no row, and goes through the other one's blocks.
  if constexpr (Traits::kCluster > 1) return all_key_blocks(mask, Traits::kTileN);
  const int row_begin = tile.m_block * Traits::kConfig.tile_m();
  const int row_end = min(row_begin + Traits::kConfig.tile_m(), mask.seqlen_q);
  const BlockRange blocks = key_blocks(mask, row_begin, row_end, Traits::kTileN);
  if constexpr (kNeverEmpty) {
    // A tile without keys has a block past the last key, zeros that no row sees. Not block 0:
    // without keys the descriptors are of Q.
    const int past = max(1, all_key_blocks(mask, Traits::kTileN).end);
    if (blocks.empty()) return {past, past + 1};
  }
  return blocks;
}

// A consumer's place in its q_stages buffers of Q, and which of all consumers' that is.
template <class Traits>
using QRing = Ring<q_stages(Traits::kConfig)>;
template <class Traits>
CUTE_DEVICE int q_index(QRing<Traits> ring, int consumer) {
  return ring.stage * Traits::kConsumers + consumer;
}

// TMA's copies of a tile, slab by slab, into consecutive shared memory of kBlocks blocks alike.
template <int kSlab, int kColumns, int kRows, int kBlocks = 1, class Element>
CUTE_DEVICE void copy_tile(CUtensorMap const& map, FullBarrier& barrier,
                           cute::TMA::CacheHintSm90 hint, Element* shared, int row, int head,
                           int batch) {
  auto* const bytes_at = reinterpret_cast<std::uint64_t*>(&barrier);
  const auto cache = static_cast<std::uint64_t>(hint);
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    Element* const slab = shared + column * kRows;
    if constexpr (kBlocks == 1) {
      cute::SM90_TMA_LOAD_4D::copy(&map, bytes_at, cache, slab, column, row, head, batch);
    } else {
      cute::SM90_TMA_LOAD_MULTICAST_4D::copy(&map, bytes_at, (1 << kBlocks) - 1, cache, slab,
                                             column, row, head, batch);
    }
  }
}

// One tile of `rows` rows.
template <int kSlab, int kColumns, int kRows, class Element>
CUTE_DEVICE void load_tile(CUtensorMap const& map, FullBarrier& barrier,
                           cute::TMA::CacheHintSm90 hint, Element* shared, int row, int head,
                           int batch) {
  barrier.arrive_and_expect_tx(kRows * kColumns * sizeof(Element));
  copy_tile<kSlab, kColumns, kRows>(map, barrier, hint, shared, row, head, batch);
}

// One block of keys of K or V, into a buffer that is free. ready, loader: of a cluster (meet).
template <class Traits, int kSlab, int kColumns, class Element>
CUTE_DEVICE void load_block(ForwardParams const& params, CUtensorMap const& map,
                            FullBarrier& barrier, EmptyBarrier* ready, std::uint32_t phase,
                            int loader, Element* shared, int row, int head, int batch) {
  constexpr auto kHint = cute::TMA::CacheHintSm90::EVICT_LAST;
  constexpr int kRows = Traits::kTileN;
  if constexpr (Traits::kCluster > 1) {
    if (params.cluster > 1) {
      barrier.arrive_and_expect_tx(kRows * kColumns * sizeof(Element));
      if (meet<Traits>(*ready, phase, loader)) {
        copy_tile<kSlab, kColumns, kRows, Traits::kCluster>(map, barrier, kHint, shared, row, head,
                                                            batch);
      }
      return;
    }
  }
  load_tile<kSlab, kColumns, kRows>(map, barrier, kHint, shared, row, head, batch);
}

// V's loads in 16 bits: rows of tokens, as they lie in memory.
template <class Traits>
struct ValueLoader {
  Ring<Traits::kStages> ring;

  CUTE_DEVICE void load(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        int n_block, int head, int batch) {
    auto& barriers = shared.barriers;
    barriers.v_empty[ring.stage].wait(ring.phase ^ 1);
    EmptyBarrier* ready = nullptr;
    if constexpr (Traits::kCluster > 1) ready = &barriers.v_ready[ring.stage];
    load_block<Traits, Traits::kSlabV, Traits::kHeadDimV>(
        params, params.v, barriers.v_full[ring.stage], ready, ring.phase, kValueLoader,
        shared.v[ring.stage], n_block * Traits::kTileN, head, batch);
    ring.advance();
  }
};

// Draws tiles and loads their K and V, right to left; V one block behind K, as they are consumed.
//
// With ahead_first a consumer waits for tile t + 1, its Q and its first K (every tile has one)
// while it holds t's slot and t's last V. Nobody waits in a circle: what it waits for takes the
// slot and Q's buffers of t - 1 and buffers of K and V that it released before, and what it holds
// is waited for only behind t + 1's first K: the slot by t + 2, V's buffer by the V two blocks on.
// Turns are taken at each tile's other blocks, as many by every consumer.
template <class Traits, class Values>
CUTE_DEVICE void produce_keys_values(ForwardParams const& params,
                                     typename Traits::SharedStorage& shared) {
  auto& barriers = shared.barriers;
  Ring<Traits::kStages> k_ring;
  Values values;
  auto load_k = [&](int first_row, int head, int batch) {
    barriers.k_empty[k_ring.stage].wait(k_ring.phase ^ 1);
    EmptyBarrier* ready = nullptr;
    if constexpr (Traits::kCluster > 1) ready = &barriers.k_ready[k_ring.stage];
    load_block<Traits, Traits::kSlab, Traits::kHeadDim>(
        params, params.k, barriers.k_full[k_ring.stage], ready, k_ring.phase, kKeyLoader,
        shared.k[k_ring.stage], first_row, head, batch);
    k_ring.advance();
  };

  std::uint32_t o_phase = 0;
  auto wait_for_o = [&] {  // once a tile: where O lies on V, the last tile's must have left
    if constexpr (Traits::kOOnV) {
      for (int i = 0; i < Traits::kConsumers; ++i) barriers.o_sent[i].wait(o_phase ^ 1);
      o_phase ^= 1;
    }
  };

  TileSource<Traits> source;
  int work_idx = source.start(params);
  constexpr bool kAhead = Traits::kConfig.ahead_first;
  TileMessage next;  // with ahead_first, told already
  auto publish_next = [&] {
    if (!source.has(params, work_idx)) return;
    next = source.find(params, work_idx);
    source.publish(barriers, next);
  };
  if constexpr (kAhead) publish_next();
  while (source.has(params, work_idx)) {
    const TileMessage drawn = kAhead ? next : source.find(params, work_idx);
    if constexpr (!kAhead) source.publish(barriers, drawn);
    const int head = drawn.head_kv;
    const int batch = drawn.tile.batch;
    const BlockRange blocks = visited_blocks<Traits>(params.mask, drawn.tile);
    for (int n_block = blocks.end - 1; n_block >= blocks.begin - 1; --n_block) {
      if (n_block >= blocks.begin) load_k(n_block * Traits::kTileN, head, batch);
      if (n_block == max(blocks.end - 2, blocks.begin - 1)) wait_for_o();  // ahead of the first V
      if constexpr (kAhead) {
        if (n_block < blocks.begin) {
          work_idx = source.draw(params, work_idx);
          publish_next();
        }
      }
      if (n_block + 1 < blocks.end) values.load(params, shared, n_block + 1, head, batch);
    }
    // As late as the loads allow: a tile drawn a whole tile ahead would go to the block that is at
    // its longest one, and the longest tiles would pair up (4% of a causal run at 16k).
    if constexpr (!kAhead) work_idx = source.draw(params, work_idx);
  }
  source.publish(barriers, no_more_tiles());
  source.finish(params);
}

// Loads each consumer's rows of Q. Q comes for a tile without keys too: in e4m3 its O may lie on
// Q's buffer.
template <class Traits>
CUTE_DEVICE void produce_queries(ForwardParams const& params,
                                 typename Traits::SharedStorage& shared) {
  auto& barriers = shared.barriers;
  TileSink<Traits> sink;
  QRing<Traits> ring;
  while (sink.next(barriers)) {
    const WorkTile tile = sink.tile(barriers).tile;
    int first_row = 0;
    if constexpr (Traits::kPacked) first_row = sink.sequence(barriers).q_begin;
    const int batch = Traits::kPacked ? 0 : tile.batch;
    sink.release(barriers);
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      const int buffer = q_index<Traits>(ring, consumer);
      barriers.q_empty[buffer].wait(ring.phase ^ 1);
      if (cute::elect_one_sync()) {
        load_tile<Traits::kSlab, Traits::kHeadDim, kConsumerRows>(
            params.q, barriers.q_full[buffer], cute::TMA::CacheHintSm90::EVICT_FIRST,
            shared.q[buffer],
            first_row + tile.m_block * Traits::kConfig.tile_m() + consumer * kConsumerRows,
            tile.head, batch);
      }
      __syncwarp();
    }
    ring.advance();
  }
}

}  // namespace hopper_attention
