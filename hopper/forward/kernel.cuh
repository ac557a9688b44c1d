// The forward kernel: one producer warpgroup and two or three consumers, on a persistent grid.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "forward/epilogue.cuh"

namespace hopper_attention {

template <class Traits>
CUTE_DEVICE void init_barriers(typename Traits::Barriers& barriers) {
  constexpr int kConsumerWarps = Traits::kConsumers * kWarpgroupWarps;
  for (int i = 0; i < Traits::kConsumers; ++i) {
    barriers.q_full[i].init(1);
    barriers.q_empty[i].init(Traits::kOverlayO ? 1 : kWarpgroupWarps);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    barriers.k_full[i].init(1);
    barriers.v_full[i].init(1);
    barriers.k_empty[i].init(kConsumerWarps);
    barriers.v_empty[i].init(kConsumerWarps);
  }
  for (int i = 0; i < kTileSlots; ++i) {
    barriers.tile_full[i].init(1);
    barriers.tile_empty[i].init(kConsumerWarps + 1);  // and the warp that loads Q
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
CUTE_DEVICE void produce(ForwardParams const& params, typename Traits::SharedStorage& shared) {
  const int warp = cutlass::canonical_warp_idx_sync();
  if (warp == 0) {
    if (cute::elect_one_sync()) produce_keys_values<Traits>(params, shared);
  } else if (warp == 1) {
    produce_queries<Traits>(params, shared);
  }
}

template <class Traits>
CUTE_DEVICE void consume(ForwardParams const& params, typename Traits::SharedStorage& shared,
                         int consumer) {
  using namespace cute;
  const int thread = threadIdx.x % kWarpgroupThreads;
  Turns<Traits>{consumer}.start();
  TileSink<Traits> sink;
  Ring<Traits::kStages> k_ring, v_ring;
  std::uint32_t q_phase = 0;
  for (int work_idx = sink.next(shared.barriers); work_idx != kNoMoreTiles;
       work_idx = sink.next(shared.barriers)) {
    const WorkTile tile = params.order(work_idx);
    const BlockRange blocks = visited_blocks<Traits>(params, tile);
    const int first_row = tile.m_block * Traits::kConfig.tile_m() + consumer * kConsumerRows;
    Softmax softmax{params.scale_log2};
    Tensor rO = partition_fragment_C(typename Traits::MmaPV{},
                                     Shape<typename Traits::M, typename Traits::Dv>{});
    attend<Traits>(params, shared, blocks, first_row, consumer, thread, k_ring, v_ring, q_phase,
                   softmax, rO);
    q_phase ^= 1;
    float lse[kRowsPerThread];
    softmax.finish(rO, lse);
    store_output<Traits>(params, shared, rO, tile, first_row, consumer, thread);
    store_lse(params, lse, tile, first_row, thread);
  }
  if (thread == 0) tma_store_wait<0>();  // shared memory lives until TMA has read it
}

template <class Instance>
__global__ void __launch_bounds__(ForwardTraits<Instance>::kThreads, 1)
    forward_kernel(__grid_constant__ const ForwardParams params) {
  using Traits = ForwardTraits<Instance>;
  constexpr RegisterSplit kSplit = register_split(Traits::kConsumers);
  extern __shared__ __align__(1024) unsigned char shared_bytes_begin[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes_begin);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&params.q);
    cute::prefetch_tma_descriptor(&params.k);
    cute::prefetch_tma_descriptor(&params.v);
    cute::prefetch_tma_descriptor(&params.out);
    init_barriers<Traits>(shared.barriers);
  }
  __syncthreads();
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kSplit.producer>();
    produce<Traits>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kSplit.consumer>();
    consume<Traits>(params, shared, warpgroup - 1);
  }
}

}  // namespace hopper_attention
