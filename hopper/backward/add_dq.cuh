// How one consumer's part of a step's dQ reaches the accumulator in global memory.
#pragma once

#include "backward/key_tile.cuh"
#include "backward/scores.cuh"

namespace hopper_attention {

// In a fixed order each key block adds to a query block when the one before has added. Without a
// mask they take turns from the first key block on. With one they do from the last that the query
// block sees: under a causal mask that one begins with this query block, so that blocks which start
// together never wait. Blocks of the grid start in the order of the turns (key_tile), so one only
// ever waits for blocks that run already.
template <class Traits>
CUTE_DEVICE unsigned int own_turn(Mask const& mask, KeyTile const& tile, int m_block) {
  const int row_begin = m_block * Traits::kTileM;
  const int row_end = min(row_begin + Traits::kTileM, mask.seqlen_q);
  const BlockRange blocks = key_blocks(mask, row_begin, row_end, Traits::kTileN);
  return Traits::kMasked ? blocks.end - 1 - tile.n_block : tile.n_block - blocks.begin;
}

CUTE_DEVICE void wait_turn(unsigned int const* turn, unsigned int own) {
  unsigned int now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (now != own);
}

CUTE_DEVICE void pass_turn(unsigned int* turn) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(turn) : "memory");
}

CUTE_DEVICE void add4(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

CUTE_DEVICE void release_turn(unsigned int* turn) {
  asm volatile("fence.acq_rel.gpu;" : : : "memory");
  pass_turn(turn);
}

inline constexpr int kKeptThreads = kWarpgroupThreads + 32;  // a consumer's and its keeper's

// Adds out of registers. One consumer's; a turn counts the consumers' adds apart.
template <class Traits>
struct DirectDq {
  float* accumulator;  // of block 0, from this thread's part on
  EmptyBarrier& turn;
  bool ordered;
  int consumer;
  std::uint32_t phase = 0;

  // Before the slices of one step, and after them.
  CUTE_DEVICE void begin() {
    if (ordered) turn.wait(phase);
  }
  CUTE_DEVICE void end() {
    if (!ordered) return;
    cutlass::arch::NamedBarrier::arrive(
        kKeptThreads, static_cast<std::uint32_t>(BackwardBarrier::kAdded) + consumer);
    phase ^= 1;
  }

  template <class Fragment>
  CUTE_DEVICE void add(Fragment const& dq, std::int64_t block, int slice) const {
    constexpr int kSize = decltype(cute::size(dq))::value;
    float* to = accumulator + block * (Traits::kConsumers * Traits::kDqElements) +
                slice * kSize * kWarpgroupThreads;
    CUTE_UNROLL
    for (int i = 0; i < kSize; i += 4) {
      add4(to + i * kWarpgroupThreads, dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
    }
  }
};

// One warp of the producer's for each consumer that adds out of registers: waits for its turns and
// passes them on, so that no consumer waits until its adds are through.
template <class Traits>
CUTE_DEVICE void keep_turns(BackwardParams const& params, KeyTile const& tile,
                            typename Traits::SharedStorage& shared, int consumer) {
  const bool leads = threadIdx.x % 32 == 0;
  for (QuerySteps at(params, tile); !at.done(); at.advance()) {
    unsigned int* turn =
        params.workspace.turns + at.block * turns_per_block(Traits::kConfig) + consumer;
    if (leads) {
      wait_turn(turn, own_turn<Traits>(tile_mask<Traits>(params, shared), tile, at.m_block));
      shared.barriers.dq_empty[consumer].arrive();
    }
    __syncwarp();
    cutlass::arch::NamedBarrier::sync(
        kKeptThreads, static_cast<std::uint32_t>(BackwardBarrier::kAdded) + consumer);
    if (leads) release_turn(turn);
  }
}

// Hands it to the producer's second warp.
template <class Traits>
struct BulkDq {
  EmptyBarrier& full;
  EmptyBarrier& empty;
  float4* shared;  // this thread's
  std::uint32_t phase = 0;

  CUTE_DEVICE void begin() {}
  CUTE_DEVICE void end() {}
  template <class Fragment>
  CUTE_DEVICE void add(Fragment const& dq, std::int64_t, int) {
    empty.wait(phase ^ 1);
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(dq))::value; i += 4) {
      shared[i / 4 * kWarpgroupThreads] = make_float4(dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
    }
    cute::tma_store_fence();
    __syncwarp();
    arrive_warp(full);
    phase ^= 1;
  }
};

template <class Traits>
CUTE_DEVICE auto make_dq_adder(BackwardParams const& params, typename Traits::SharedStorage& shared,
                               int consumer, int thread) {
  if constexpr (Traits::kDqBulk) {
    auto& barriers = shared.barriers;
    return BulkDq<Traits>{
        barriers.dq_full[consumer], barriers.dq_empty[consumer],
        reinterpret_cast<float4*>(shared.dq + consumer * Traits::kDqElements) + thread};
  } else {
    return DirectDq<Traits>{params.workspace.dq + consumer * Traits::kDqElements + thread * 4,
                            shared.barriers.dq_empty[consumer], params.workspace.turns != nullptr,
                            consumer};
  }
}

// Adds `bytes` of fp32 numbers in shared memory to those at `global`.
CUTE_DEVICE void reduce_add(float* global, float const* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(global), "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(bytes)
               : "memory");
}

// All groups have been added, not merely read.
CUTE_DEVICE void reduce_wait() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }

CUTE_DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" : : : "memory"); }

// One thread. Takes each consumer's dQ out of shared memory as it comes.
template <class Traits>
CUTE_DEVICE void add_dq(BackwardParams const& params, KeyTile const& tile,
                        typename Traits::SharedStorage& shared) {
  constexpr int kConsumers = Traits::kConsumers;
  constexpr int kBytes = Traits::kDqElements * sizeof(float);
  auto& barriers = shared.barriers;
  std::uint32_t phase = 0;
  for (QuerySteps at(params, tile); !at.done(); at.advance()) {
    float* accumulator = params.workspace.dq + at.block * kConsumers * Traits::kDqElements;
    unsigned int* turn =
        params.workspace.turns == nullptr ? nullptr : params.workspace.turns + at.block;
    if (turn != nullptr) {
      wait_turn(turn, own_turn<Traits>(tile_mask<Traits>(params, shared), tile, at.m_block));
      fence_async_global();
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      barriers.dq_full[consumer].wait(phase);
      reduce_add(accumulator + consumer * Traits::kDqElements,
                 shared.dq + consumer * Traits::kDqElements, kBytes);
      cute::tma_store_arrive();
    }
    phase ^= 1;
    cute::tma_store_wait<kConsumers - 1>();
    barriers.dq_empty[0].arrive();
    if constexpr (kConsumers == 3) {
      cute::tma_store_wait<1>();
      barriers.dq_empty[1].arrive();
    }
    cute::tma_store_wait<0>();
    barriers.dq_empty[kConsumers - 1].arrive();
    if (turn != nullptr) {
      reduce_wait();
      fence_async_global();
      pass_turn(turn);
    }
  }
  reduce_wait();
}

}  // namespace hopper_attention
