// How one consumer's part of a step's dQ reaches the accumulator in global memory.
#pragma once

#include "backward/scores.cuh"

namespace hopper_attention {

// In a fixed order key blocks add to a query block from the first that it sees on, each when the
// one before has added. Blocks of the grid start in this order too, so one only ever waits for
// blocks that run already.
template <class Traits>
CUTE_DEVICE unsigned int own_turn(Mask const& mask, KeyTile const& tile, int m_block) {
  const int row_begin = m_block * Traits::kTileM;
  const int row_end = min(row_begin + Traits::kTileM, mask.seqlen_q);
  return tile.n_block - key_blocks(mask, row_begin, row_end, Traits::kTileN).begin;
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

// Adds out of registers. One consumer's; a turn counts the consumers' adds apart.
template <class Traits>
struct DirectDq {
  BackwardParams const& params;
  KeyTile const& tile;
  int consumer;
  int thread;
  unsigned int* taken = nullptr;  // a turn that is still to be passed on

  // Before the slices of one step.
  CUTE_DEVICE void begin(int m_block, std::int64_t block) {
    if (params.workspace.turns == nullptr) return;
    pass();  // the last step's adds are through by now, and waiting for them is short
    taken = params.workspace.turns + block * turns_per_block(Traits::kConfig) + consumer;
    if (thread == 0) wait_turn(taken, own_turn<Traits>(params.mask, tile, m_block));
    sync_consumer(consumer);
  }
  CUTE_DEVICE void pass() {
    if (taken == nullptr) return;
    __threadfence();
    sync_consumer(consumer);
    if (thread == 0) pass_turn(taken);
    taken = nullptr;
  }

  template <class Fragment>
  CUTE_DEVICE void add(Fragment const& dq, std::int64_t block, int slice) const {
    constexpr int kSize = decltype(cute::size(dq))::value;
    float* to = params.workspace.dq +
                (block * Traits::kConsumers + consumer) * Traits::kDqElements +
                (slice * kSize / 4 * kWarpgroupThreads + thread) * 4;
    CUTE_UNROLL
    for (int i = 0; i < kSize; i += 4) {
      add4(to + i * kWarpgroupThreads, dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
    }
  }
  CUTE_DEVICE void finish() { pass(); }
};

// Hands it to the producer's second warp.
template <class Traits>
struct BulkDq {
  EmptyBarrier& full;
  EmptyBarrier& empty;
  float4* shared;  // this thread's
  std::uint32_t phase = 0;

  CUTE_DEVICE void begin(int, std::int64_t) {}
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
  CUTE_DEVICE void finish() {}
};

template <class Traits>
CUTE_DEVICE auto make_dq_adder(BackwardParams const& params, KeyTile const& tile,
                               typename Traits::SharedStorage& shared, int consumer, int thread) {
  if constexpr (Traits::kDqBulk) {
    auto& barriers = shared.barriers;
    return BulkDq<Traits>{
        barriers.dq_full[consumer], barriers.dq_empty[consumer],
        reinterpret_cast<float4*>(shared.dq + consumer * Traits::kDqElements) + thread};
  } else {
    return DirectDq<Traits>{params, tile, consumer, thread};
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

CUTE_DEVICE void fence_async_global() {
  asm volatile("fence.proxy.async.global;" : : : "memory");
}

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
      wait_turn(turn, own_turn<Traits>(params.mask, tile, at.m_block));
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
