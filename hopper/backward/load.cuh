// The producer: K, V, Q, dO and their rows' statistics by TMA.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "backward/params.h"
#include "common/barriers.cuh"
#include "hopper_attention/backward_budget.h"
#include "hopper_attention/query_steps.h"

namespace hopper_attention {

// The keys of one block, the heads they serve, and the query blocks that see them.
struct KeyTile {
  int n_block;
  int head_kv;
  int batch;
  BlockRange m_blocks;
};

template <class Traits>
CUTE_DEVICE KeyTile key_tile(BackwardParams const& params) {
  const WorkTile work = params.order(blockIdx.x);
  const int n_block = key_block(params.order, work, params.last_first);
  const int begin = n_block * Traits::kTileN;
  const int end = min(begin + Traits::kTileN, params.mask.seqlen_k);
  if (params.heads_per_kv == 0) return {n_block, work.head, work.batch, {0, 0}};
  return {n_block, work.head, work.batch, query_blocks(params.mask, begin, end, Traits::kTileM)};
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
          workspace_block(params, tile.batch, first_head, 0)};
}

// kRows rows, slab by slab, into consecutive shared memory. The barrier expects the bytes already.
template <int kSlab, int kColumns, int kRows, class Element>
CUTE_DEVICE void load_slabs(CUtensorMap const& map, FullBarrier& barrier,
                            cute::TMA::CacheHintSm90 hint, Element* shared, int row, int head,
                            int batch) {
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier),
                                 static_cast<std::uint64_t>(hint), shared + column * kRows, column,
                                 row, head, batch);
  }
}

template <class Traits>
CUTE_DEVICE void produce(BackwardParams const& params, KeyTile const& tile,
                         typename Traits::SharedStorage& shared) {
  using cute::TMA::CacheHintSm90;
  constexpr int kM = Traits::kTileM, kN = Traits::kTileN;
  constexpr int kD = Traits::kHeadDim, kDv = Traits::kHeadDimV;
  constexpr int kStatisticsBytes = kM * sizeof(float);
  auto& barriers = shared.barriers;
  auto load_statistics = [&](FullBarrier& barrier, float* to, float const* from, int head,
                             int m_block) {
    cute::SM90_BULK_COPY_G2S::copy(from + workspace_block(params, tile.batch, head, m_block) * kM,
                                   reinterpret_cast<std::uint64_t*>(&barrier), to,
                                   kStatisticsBytes);
  };
  bool first = true;
  Ring<Traits::kStages> ring;
  for (QuerySteps at = query_steps(params, tile); !at.done(); at.advance()) {
    const int stage = ring.stage;
    const int head = tile.head_kv * params.heads_per_kv + at.head(), m_block = at.m_block;
    if (first) {
      barriers.k_full.arrive_and_expect_tx(kN * kD * kElementBytes);
      load_slabs<Traits::kSlabK, kD, kN>(params.k, barriers.k_full, CacheHintSm90::EVICT_FIRST,
                                         shared.k, tile.n_block * kN, tile.head_kv, tile.batch);
    }
    FullBarrier& q_full = barriers.q_full[stage];
    barriers.q_empty[stage].wait(ring.phase ^ 1);
    q_full.arrive_and_expect_tx(kM * kD * kElementBytes + kStatisticsBytes);
    load_slabs<Traits::kSlab, kD, kM>(params.q, q_full, CacheHintSm90::EVICT_LAST, shared.q[stage],
                                      m_block * kM, head, tile.batch);
    load_statistics(q_full, shared.lse_log2[stage], params.workspace.lse_log2, head, m_block);
    if (first) {
      barriers.v_full.arrive_and_expect_tx(kN * kDv * kElementBytes);
      load_slabs<Traits::kSlabV, kDv, kN>(params.v, barriers.v_full, CacheHintSm90::EVICT_FIRST,
                                          shared.v, tile.n_block * kN, tile.head_kv, tile.batch);
      first = false;
    }
    FullBarrier& dout_full = barriers.dout_full[stage];
    barriers.dout_empty[stage].wait(ring.phase ^ 1);
    dout_full.arrive_and_expect_tx(kM * kDv * kElementBytes + kStatisticsBytes);
    load_slabs<Traits::kSlabV, kDv, kM>(params.dout, dout_full, CacheHintSm90::EVICT_LAST,
                                        shared.dout[stage], m_block * kM, head, tile.batch);
    load_statistics(dout_full, shared.delta[stage], params.workspace.delta, head, m_block);
    ring.advance();
  }
}

}  // namespace hopper_attention
