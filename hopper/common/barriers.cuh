// Barriers: rings of mbarriers between the copy engine and the tensor cores, and named barriers.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace hopper_attention {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;  // completed by arrivals and bytes
using EmptyBarrier = cutlass::arch::ClusterBarrier;            // completed by arrivals

// A place in a ring of kStages buffers. Whoever fills waits on `empty` with phase ^ 1 (a fresh
// barrier counts as empty), whoever drains waits on `full` with phase.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t phase = 0;

  CUTLASS_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <>
struct Ring<1> {
  static constexpr int stage = 0;
  std::uint32_t phase = 0;

  CUTLASS_DEVICE void advance() { phase ^= 1; }
};

// One arrival a warp: the barrier counts warps.
CUTLASS_DEVICE void arrive_warp(EmptyBarrier& barrier) {
  if (cute::elect_one_sync()) barrier.arrive();
}

// Named barriers of the consumers. CUTLASS shifts them past the hardware barriers it reserves.
enum class NamedBarrier : std::uint32_t {
  kTurn = 0,      // 0 to 2: consumer i may issue its products (ping-pong)
  kEpilogue = 3,  // 3 to 5: consumer i's O is in shared memory
  kTileEnd = 6,   // every consumer has multiplied with V for the last time
};

CUTLASS_DEVICE std::uint32_t barrier_id(NamedBarrier barrier, int consumer) {
  return static_cast<std::uint32_t>(barrier) + static_cast<std::uint32_t>(consumer);
}

CUTLASS_DEVICE void sync_named(NamedBarrier barrier, int consumer, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, barrier_id(barrier, consumer));
}

CUTLASS_DEVICE void arrive_named(NamedBarrier barrier, int consumer, int threads) {
  cutlass::arch::NamedBarrier::arrive(threads, barrier_id(barrier, consumer));
}

}  // namespace hopper_attention
