// The producer: K, V, Q, dO and their rows' statistics by TMA.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "backward/params.h"
#include "backward/traits.cuh"
#include "common/barriers.cuh"
#include "common/chain.h"
#include "hopper_attention/backward_budget.h"
#include "hopper_attention/query_steps.h"
#include "hopper_attention/ragged.h"

namespace hopper_attention {

// The keys of one block, the heads they serve, and the query blocks that see them.
struct KeyTile {
  int n_block;
  int head_kv;
  int batch;  // of the workspace; 0 where first_block counts from its beginning
  BlockRange m_blocks;
  int first_block;  // of the workspace
  RowOrigin q;      // of Q and dO
  RowOrigin k;      // of K and V
  int wrap;         // of ragged tensors
};

// Out of shared memory, anew each time: registers are what is short.
CUTE_DEVICE int4 load_tile_words(SharedTile const& tile, int index) {
  int4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(cute::cast_smem_ptr_to_uint(&tile) + 16 * index));
  return words;
}

// What a warp needs to know of a tile that is in shared memory.
template <class Traits>
CUTE_DEVICE KeyTile told_tile(typename Traits::SharedStorage const& shared, int slot) {
  SharedTile const& tile = shared.tile[slot];
  const int4 a = load_tile_words(tile, 0), b = load_tile_words(tile, 1);
  const int4 c = load_tile_words(tile, 3);
  const int wrap = Traits::kCapped ? a.w : Traits::kRagged ? kRaggedRows : 0;
  return {a.x, a.y, 0, {c.x, c.y}, a.z, {b.x, b.y}, {b.z, b.w}, wrap};
}

template <class Traits>
CUTE_DEVICE KeyTile key_tile(BackwardParams const& params, int index) {
  // Blocks of a cluster go through the query blocks that see a key of any of them.
  constexpr int kCluster = Traits::kCluster, kKeys = kCluster * Traits::kTileN;
  const WorkTile work = params.order(index / kCluster);
  const int cluster = key_block(params.order, work, params.last_first);
  const int n_block = cluster * kCluster + index % kCluster;
  const int begin = cluster * kKeys;
  const int end = min(begin + kKeys, params.mask.seqlen_k);
  const BlockRange m_blocks = params.heads_per_kv == 0
                                  ? BlockRange{0, 0}
                                  : query_blocks(params.mask, begin, end, Traits::kTileM);
  const RowOrigin origin{0, work.batch};
  return {n_block, work.head, work.batch, m_blocks, 0, origin, origin, 0};
}

// Which of the (batch, heads, query blocks) blocks in the workspace.
CUTE_DEVICE std::int64_t workspace_block(BackwardParams const& params, int batch, int head,
                                         int m_block) {
  const int heads = params.order.heads * params.heads_per_kv;
  return (static_cast<std::int64_t>(batch) * heads + head) * params.num_m_blocks + m_block;
}

// What a key block is multiplied with, in the order in which every warp of the block takes it. The
// query heads of a group belong to the same block, so that dK and dV are summed over them in
// registers.
CUTE_DEVICE QuerySteps query_steps(BackwardParams const& params, KeyTile const& tile) {
  const int first_head = tile.head_kv * params.heads_per_kv;
  return {tile.m_blocks, params.heads_per_kv, params.num_m_blocks, params.descending,
          workspace_block(params, tile.batch, first_head, tile.first_block)};
}

// kRows rows, kColumns columns from `first` on, slab by slab, into consecutive shared memory. The
// barrier expects the bytes already.
template <class Traits, int kSlab, int kColumns, int kRows, class Element>
CUTE_DEVICE void load_slabs(CUtensorMap const& map, FullBarrier& barrier,
                            cute::TMA::CacheHintSm90 hint, Element* shared, RowOrigin origin,
                            int row, int head, int wrap, int first = 0) {
  auto* const bytes = reinterpret_cast<std::uint64_t*>(&barrier);
  const auto policy = static_cast<std::uint64_t>(hint);
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    Element* const to = shared + column * kRows;
    if constexpr (Traits::kRagged) {
      cute::SM90_TMA_LOAD_5D::copy(&map, bytes, policy, to, first + column, origin.row + row, head,
                                   origin.shift, wrap);
    } else {
      cute::SM90_TMA_LOAD_4D::copy(&map, bytes, policy, to, first + column, origin.row + row, head,
                                   origin.shift);
    }
  }
}

// The tile's keys; and of a cluster's other block, the columns of this one's dQ.
template <class Traits>
CUTE_DEVICE void load_keys(BackwardParams const& params, KeyTile const& tile,
                           typename Traits::SharedStorage& shared, int slot) {
  constexpr int kN = Traits::kTileN, kD = Traits::kHeadDim, kPeerD = Traits::kPeerColumns;
  constexpr auto kHint = cute::TMA::CacheHintSm90::EVICT_FIRST;
  FullBarrier& full = shared.barriers.k_full[slot];
  full.arrive_and_expect_tx(kN * (kD + kPeerD) * kElementBytes);
  load_slabs<Traits, Traits::kSlabK, kD, kN>(params.k, full, kHint, shared.k[slot], tile.k,
                                             tile.n_block * kN, tile.head_kv, tile.wrap);
  if constexpr (Traits::kClustered) {
    load_slabs<Traits, Traits::kSlabK, kPeerD, kN>(params.k, full, kHint, shared.peer_k, tile.k,
                                                   (tile.n_block ^ 1) * kN, tile.head_kv, tile.wrap,
                                                   tile.n_block % Traits::kCluster * kPeerD);
  }
}

// Where there is one V for all tiles, when the last tile's dP no longer needs it.
template <class Traits>
CUTE_DEVICE void load_values(BackwardParams const& params, KeyTile const& tile,
                             typename Traits::SharedStorage& shared, int slot) {
  constexpr int kN = Traits::kTileN, kDv = Traits::kHeadDimV;
  FullBarrier& full = shared.barriers.v_full[slot];
  if constexpr (Traits::kSharedValues) shared.barriers.v_empty[0].wait(slot ^ 1);
  full.arrive_and_expect_tx(kN * kDv * kElementBytes);
  load_slabs<Traits, Traits::kSlabV, kDv, kN>(params.v, full, cute::TMA::CacheHintSm90::EVICT_FIRST,
                                              shared.v[slot % Traits::kValueBuffers], tile.k,
                                              tile.n_block * kN, tile.head_kv, tile.wrap);
}

// A producer's place in the rings of Q and dO: one for both where they have as many stages.
template <class Traits>
struct QueryRings {
  static constexpr bool kOne = Traits::kDoutStages == Traits::kStages;
  Ring<Traits::kStages> q;
  Ring<Traits::kDoutStages> dout;

  CUTE_DEVICE int dout_stage() const { return kOne ? q.stage : dout.stage; }
  CUTE_DEVICE std::uint32_t dout_phase() const { return kOne ? q.phase : dout.phase; }
  CUTE_DEVICE void advance() {
    q.advance();
    if constexpr (!kOne) dout.advance();
  }
};

// One thread. slot: the tile's; `rings` run on from tile to tile.
template <class Traits>
CUTE_DEVICE void produce(BackwardParams const& params, KeyTile const& tile,
                         typename Traits::SharedStorage& shared, int slot,
                         QueryRings<Traits>& rings) {
  using cute::TMA::CacheHintSm90;
  constexpr int kM = Traits::kTileM;
  constexpr int kD = Traits::kHeadDim, kDv = Traits::kHeadDimV;
  constexpr int kStatisticsBytes = kM * sizeof(float);
  auto& barriers = shared.barriers;
  auto load_statistics = [&](FullBarrier& barrier, float* to, float const* from, int head,
                             int m_block) {
    cute::SM90_BULK_COPY_G2S::copy(
        from + workspace_block(params, tile.batch, head, tile.first_block + m_block) * kM,
        reinterpret_cast<std::uint64_t*>(&barrier), to, kStatisticsBytes);
  };
  // What only the keys' loads need is read again: registers are short.
  auto keys = [&] {
    if constexpr (Traits::kAlike) {
      return told_tile<Traits>(shared, slot);
    } else {
      return tile;
    }
  };
  bool first = true;
  for (QuerySteps at = query_steps(params, tile); !at.done(); at.advance()) {
    const int stage = rings.q.stage;
    const int head = tile.head_kv * params.heads_per_kv + at.head(), m_block = at.m_block;
    if (first) load_keys<Traits>(params, keys(), shared, slot);
    FullBarrier& q_full = barriers.q_full[stage];
    barriers.q_empty[stage].wait(rings.q.phase ^ 1);
    // A cluster's dO goes back before delta is read, which therefore comes with Q.
    constexpr int kWithQ = (Traits::kClustered ? 2 : 1) * kStatisticsBytes;
    q_full.arrive_and_expect_tx(kM * kD * kElementBytes + kWithQ);
    load_slabs<Traits, Traits::kSlab, kD, kM>(params.q, q_full, CacheHintSm90::EVICT_LAST,
                                              shared.q[stage], tile.q, m_block * kM, head,
                                              tile.wrap);
    if (Traits::kEarlyLoads && first) wait_for_last_kernel();
    load_statistics(q_full, shared.lse_log2[stage], params.workspace.lse_log2, head, m_block);
    if constexpr (Traits::kClustered) {
      load_statistics(q_full, shared.delta[stage], params.workspace.delta, head, m_block);
    }
    if (first && !Traits::kSharedValues) load_values<Traits>(params, keys(), shared, slot);
    const int dout_stage = rings.dout_stage();
    FullBarrier& dout_full = barriers.dout_full[dout_stage];
    barriers.dout_empty[dout_stage].wait(rings.dout_phase() ^ 1);
    constexpr int kWithDout = 2 * kStatisticsBytes - kWithQ;
    dout_full.arrive_and_expect_tx(kM * kDv * kElementBytes + kWithDout);
    load_slabs<Traits, Traits::kSlabV, kDv, kM>(params.dout, dout_full, CacheHintSm90::EVICT_LAST,
                                                shared.dout[dout_stage], tile.q, m_block * kM, head,
                                                tile.wrap);
    if constexpr (!Traits::kClustered) {
      load_statistics(dout_full, shared.delta[dout_stage], params.workspace.delta, head, m_block);
    }
    // Behind what does not wait for the last tile.
    if (first && Traits::kSharedValues) load_values<Traits>(params, keys(), shared, slot);
    first = false;
    rings.advance();
  }
}

}  // namespace hopper_attention
