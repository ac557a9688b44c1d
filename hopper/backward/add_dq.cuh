// How one consumer's part of a step's dQ reaches the accumulator in global memory.
#pragma once

#include "backward/scheduler.cuh"
#include "backward/scores.cuh"

namespace hopper_attention {

// In a fixed order each key block adds to a query block when those before it have added.
template <class Traits>
CUTE_DEVICE unsigned int own_turn(BackwardParams const& params, Mask const& mask,
                                  KeyTile const& tile, int m_block) {
  return add_turn(mask, tile.n_block, m_block, Traits::kTileM, Traits::kTileN, params.last_first,
                  Traits::kCluster);
}

template <int kCluster>
CUTE_DEVICE void wait_turn(unsigned int const* turn, unsigned int own) {
  unsigned int now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (!turn_has_come(now, own, kCluster));
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

// In a fixed order two warps of the producer's keep the turns of every other step each: a turn is
// polled, and what was added made visible before the next one's, about 2 us each. One warp for all
// steps would do that in series, which takes longer than a step's products.
inline constexpr int kKeepers = 2;

// The consumers' threads and those of one keeper.
template <class Traits>
inline constexpr int kKeptThreads = Traits::kConsumers * kWarpgroupThreads + 32;

// Adds out of registers. One consumer's.
template <class Traits>
struct DirectDq {
  float* accumulator;   // of block 0, from this thread's part on
  EmptyBarrier* turns;  // a keeper's each
  bool ordered;
  std::uint32_t step = 0;

  // Before the slices of one step, and after them.
  CUTE_DEVICE void begin() {
    if (ordered) turns[step % kKeepers].wait(step / kKeepers % 2);
  }
  CUTE_DEVICE void end() {
    if (!ordered) return;
    cutlass::arch::NamedBarrier::arrive(
        kKeptThreads<Traits>,
        static_cast<std::uint32_t>(BackwardBarrier::kKeeper) + step % kKeepers);
    ++step;
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

// A keeper's warp where consumers add out of registers: waits for its turns and passes them on, so
// that no consumer waits until its adds are through. Keepers know nothing of each other: a step has
// its keeper's barriers, which the step after the next uses again once this keeper has seen that
// all consumers are done with this one.
template <class Traits, class Tiles>
CUTE_DEVICE void keep_turns(BackwardParams const& params, Tiles const& tiles,
                            typename Traits::SharedStorage& shared, int keeper) {
  static_assert(Traits::kConsumers >= kKeepers, "dq_empty is one for each keeper here");
  const bool leads = threadIdx.x % 32 == 0;
  int step = 0;
  tiles.each(shared, leads, [&](KeyTile const& tile, int slot) {
    for (QuerySteps at = query_steps(params, tile); !at.done(); at.advance()) {
      if (step++ % kKeepers != keeper) continue;
      unsigned int* turn = params.workspace.turns + at.block;
      if (leads) {
        const Mask mask = tile_mask<Traits>(params, shared, slot);
        wait_turn<Traits::kCluster>(turn, own_turn<Traits>(params, mask, tile, at.m_block));
        shared.barriers.dq_empty[keeper].arrive();
      }
      __syncwarp();
      cutlass::arch::NamedBarrier::sync(
          kKeptThreads<Traits>, static_cast<std::uint32_t>(BackwardBarrier::kKeeper) + keeper);
      if (leads) pass_turn(turn);
    }
    __syncwarp();
  });
}

// Hands parts of it to the producer: a consumer's own, or all, one after the other.
template <class Traits>
struct BulkDq {
  static_assert(Traits::kDqSlices == 1, "a part has one buffer");
  EmptyBarrier* full;  // of the first part
  EmptyBarrier* empty;
  float4* shared;  // this thread's of the first part
  std::uint32_t phase = 0;

  CUTE_DEVICE void begin() {}
  CUTE_DEVICE void end() { phase ^= 1; }
  template <class Fragment>
  CUTE_DEVICE void add(Fragment const& dq, std::int64_t, int part) {
    constexpr int kSize = decltype(cute::size(dq))::value;
    empty[part].wait(phase ^ 1);
    CUTE_UNROLL
    for (int i = 0; i < kSize; i += 4) {
      shared[(part * kSize + i) / 4 * kWarpgroupThreads] =
          make_float4(dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
    }
    cute::tma_store_fence();
    __syncwarp();
    arrive_warp(full[part]);
  }
};

template <class Traits>
CUTE_DEVICE auto make_dq_adder(BackwardParams const& params, typename Traits::SharedStorage& shared,
                               int consumer, int thread) {
  if constexpr (Traits::kDqBulk) {
    auto& barriers = shared.barriers;
    return BulkDq<Traits>{
        barriers.dq_full + consumer, barriers.dq_empty + consumer,
        reinterpret_cast<float4*>(shared.dq + consumer * Traits::kDqElements) + thread};
  } else {
    float* accumulator = params.workspace.dq + consumer * Traits::kDqElements + thread * 4;
    if constexpr (Traits::kClustered) {  // the block's slice
      accumulator += blockIdx.x % Traits::kCluster * (Traits::kDqElements / Traits::kCluster);
    }
    return DirectDq<Traits>{accumulator, shared.barriers.dq_empty,
                            params.workspace.turns != nullptr};
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

// One thread. Takes a step's dQ out of shared memory as it comes.
template <class Traits>
CUTE_DEVICE void issue_adds(BackwardParams const& params, typename Traits::SharedStorage& shared,
                            std::int64_t block, std::uint32_t phase) {
  constexpr int kConsumers = Traits::kConsumers;
  constexpr int kBytes = Traits::kDqElements * sizeof(float);
  float* accumulator = params.workspace.dq + block * kConsumers * Traits::kDqElements;
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    shared.barriers.dq_full[consumer].wait(phase);
    reduce_add(accumulator + consumer * Traits::kDqElements,
               shared.dq + consumer * Traits::kDqElements, kBytes);
    cute::tma_store_arrive();
  }
}

// The same thread, then: gives the buffers back when they have been read.
template <class Traits>
CUTE_DEVICE void return_buffers(typename Traits::SharedStorage& shared) {
  constexpr int kConsumers = Traits::kConsumers;
  auto& barriers = shared.barriers;
  cute::tma_store_wait<kConsumers - 1>();
  barriers.dq_empty[0].arrive();
  if constexpr (kConsumers == 3) {
    cute::tma_store_wait<1>();
    barriers.dq_empty[1].arrive();
  }
  cute::tma_store_wait<0>();
  barriers.dq_empty[kConsumers - 1].arrive();
}

// One thread, in any order.
template <class Traits, class Tiles>
CUTE_DEVICE void add_dq(BackwardParams const& params, Tiles const& tiles,
                        typename Traits::SharedStorage& shared) {
  std::uint32_t phase = 0;
  tiles.each(shared, true, [&](KeyTile const& tile, int) {
    for (QuerySteps at = query_steps(params, tile); !at.done(); at.advance()) {
      issue_adds<Traits>(params, shared, at.block, phase);
      phase ^= 1;
      return_buffers<Traits>(shared);
    }
  });
  reduce_wait();
}

// A keeper's warp, in a fixed order. Both take from the same buffers, so one waits for a step's dQ
// only after the other has taken the step's before: a barrier's phase must be seen before the next
// one ends.
template <class Traits, class Tiles>
CUTE_DEVICE void add_dq_in_turn(BackwardParams const& params, Tiles const& tiles,
                                typename Traits::SharedStorage& shared, int keeper) {
  constexpr std::uint32_t kKeeper = static_cast<std::uint32_t>(BackwardBarrier::kKeeper);
  constexpr int kBoth = kKeepers * 32;
  const bool leads = threadIdx.x % 32 == 0;
  int step = 0;
  tiles.each(shared, leads, [&](KeyTile const& tile, int slot) {
    for (QuerySteps at = query_steps(params, tile); !at.done(); at.advance(), ++step) {
      if (step % kKeepers != keeper) continue;
      unsigned int* turn = params.workspace.turns + at.block;
      if (leads) {
        const Mask mask = tile_mask<Traits>(params, shared, slot);
        wait_turn<Traits::kCluster>(turn, own_turn<Traits>(params, mask, tile, at.m_block));
        fence_async_global();
      }
      __syncwarp();
      if (step > 0) cutlass::arch::NamedBarrier::sync(kBoth, kKeeper + keeper);
      if (leads) issue_adds<Traits>(params, shared, at.block, step % 2);
      __syncwarp();
      cutlass::arch::NamedBarrier::arrive(kBoth, kKeeper + (keeper ^ 1));
      if (leads) {
        return_buffers<Traits>(shared);
        reduce_wait();
        fence_async_global();
        pass_turn(turn);
      }
      __syncwarp();
    }
    __syncwarp();
  });
  // The last step's arrival.
  if (step > 0 && step % kKeepers == keeper) {
    cutlass::arch::NamedBarrier::sync(kBoth, kKeeper + keeper);
  }
}

}  // namespace hopper_attention
