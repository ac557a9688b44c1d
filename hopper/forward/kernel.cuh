// The forward kernel: one producer warpgroup and two or three consumers, on a persistent grid.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "forward/epilogue.cuh"
#include "forward/fp8_epilogue.cuh"
#include "forward/fp8_load.cuh"
#include "forward/packed_epilogue.cuh"
#include "forward/packed_load.cuh"

namespace hopper_attention {

// transposers: warps that turn rows of V into columns, none where V comes as the product wants it.
// o_on_q: the thread that sends O releases Q, instead of the warps that multiply with it.
template <class Traits>
CUTE_DEVICE void init_barriers(typename Traits::Barriers& barriers, int transposers, bool o_on_q) {
  constexpr int kConsumerWarps = Traits::kConsumers * kWarpgroupWarps;
  for (int i = 0; i < q_stages(Traits::kConfig) * Traits::kConsumers; ++i) {
    barriers.q_full[i].init(1);
    barriers.q_empty[i].init(o_on_q ? 1 : kWarpgroupWarps);
    if constexpr (!Traits::kFp8) {
      if (i < Traits::kConsumers) barriers.o_sent[i].init(1);
    }
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    barriers.k_full[i].init(1);
    barriers.v_full[i].init(transposers > 0 ? transposers : 1);
    barriers.k_empty[i].init(kConsumerWarps);
    barriers.v_empty[i].init(kConsumerWarps);
    if constexpr (Traits::kCluster > 1) {
      barriers.k_ready[i].init(1);
      barriers.v_ready[i].init(1);
    }
  }
  for (int i = 0; i < Traits::kTileSlots; ++i) {
    barriers.tile_full[i].init(1);
    // The warp that loads Q reads them too, and those that transpose V or clear its last rows.
    barriers.tile_empty[i].init(kConsumerWarps + 1 + transposers + (Traits::kPacked ? 1 : 0));
  }
  if constexpr (Traits::kPacked) {
    for (int i = 0; i < Traits::kStages; ++i) barriers.v_tail[i].init(1);
  }
  if constexpr (Traits::kMayTranspose) {
    for (int i = 0; i < kRawStages; ++i) {
      barriers.raw_full[i].init(1);
      barriers.raw_empty[i].init(kTransposeWarps);
    }
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
CUTE_DEVICE void produce(ForwardParams const& params, typename Traits::SharedStorage& shared) {
  const int warp = cutlass::canonical_warp_idx_sync();
  using Values = cute::conditional_t<Traits::kFp8, Fp8ValueLoader<Traits>, ValueLoader<Traits>>;
  if (warp == 0) {
    if (cute::elect_one_sync()) {
      if constexpr (Traits::kPacked) {
        produce_packed<Traits>(params, shared);
      } else {
        produce_keys_values<Traits, Values>(params, shared);
      }
    }
  } else if (warp == 1) {
    produce_queries<Traits>(params, shared);
  } else if constexpr (Traits::kMayTranspose) {
    if (!params.v_transposed) transpose_values<Traits>(params, shared, warp - 2);
  } else if constexpr (Traits::kPacked) {
    if (warp == 2) clear_last_values<Traits>(params, shared);
  } else {
    if (warp == 2) stay_until_cluster_is_done<Traits>();
  }
}

// One tile of one consumer's rows, from its scores to O and LSE in global memory. mask: the tile's.
// first_scores, issue_next: see attend.
template <class Traits, class FirstScores, class IssueNext>
CUTE_DEVICE void consume_tile(ForwardParams const& params, typename Traits::SharedStorage& shared,
                              TileSink<Traits> const& sink, Mask const& mask, int consumer,
                              int thread, Ring<Traits::kStages>& k_ring,
                              Ring<Traits::kStages>& v_ring, QRing<Traits> q_ring,
                              FirstScores& first_scores, IssueNext const& issue_next) {
  using namespace cute;
  const TileMessage message = sink.tile(shared.barriers);
  const BlockRange blocks = visited_blocks<Traits>(mask, message.tile);
  const int first_row = message.tile.m_block * Traits::kConfig.tile_m() + consumer * kConsumerRows;
  float lse[kRowsPerThread];
  if constexpr (Traits::kFp8) {
    // MmaPV's registers of O, or those of as many MmaPart as O has parts.
    using Mma =
        cute::conditional_t<Traits::kParts == 1, typename Traits::MmaPV, typename Traits::MmaPart>;
    Fp8Softmax<Traits> softmax;
    Tensor rO = partition_fragment_C(Mma{}, Shape<typename Traits::M, Int<Traits::kOColumns>>{});
    attend<Traits>(params, shared, sink, blocks, first_row, consumer, thread, k_ring, v_ring,
                   q_ring.phase, softmax, rO);
    // Else addresses made of it would last through the products; without masks there is room.
    if constexpr (Traits::kMasked) thread = fresh_thread() % kWarpgroupThreads;
    const TileMessage done = sink.tile(shared.barriers);
    finish_fp8<Traits>(params, shared, softmax, rO, done, consumer, thread, lse);
    store_fp8_output<Traits>(params, shared, rO, done.tile, first_row, consumer, thread);
    store_lse(params, lse, done.tile, first_row, thread);
  } else {
    Softmax softmax{params.scale_log2};
    Tensor rO = partition_fragment_C(typename Traits::MmaPV{},
                                     Shape<typename Traits::M, typename Traits::Dv>{});
    attend<Traits>(params, shared, sink, mask, blocks, first_row, consumer, thread, k_ring, v_ring,
                   q_ring, softmax, rO, first_scores, [&] {
                     if constexpr (Traits::kPacked) {
                       finish_packed_rows(params, shared, sink, first_row, softmax, lse);
                     }
                     issue_next();
                   });
    if constexpr (Traits::kPacked) {
      asm volatile("" : "+r"(thread));  // else addresses made of it would last through the products
      store_packed(params, shared, sink, softmax, rO, lse, first_row, consumer, thread);
    } else {
      const WorkTile tile = sink.tile(shared.barriers).tile;
      softmax.finish_rows(read_sink(params, tile.head), lse);
      softmax.rescale(rO);
      stage_output<Traits>(shared, rO, consumer, thread);
      if (thread == 0) {
        send_output<Traits>(params, shared, first_row, tile.head, tile.batch, consumer);
      }
      store_lse(params, lse, tile, first_row, thread);
    }
  }
}

template <class Traits>
CUTE_DEVICE void consume_tiles(ForwardParams const& params, typename Traits::SharedStorage& shared,
                               int consumer, int thread) {
  TileSink<Traits> sink;
  Ring<Traits::kStages> k_ring, v_ring;
  std::uint32_t q_phase = 0;
  struct None {
    CUTE_DEVICE void operator()() const {}
  } none;
  while (sink.next(shared.barriers)) {
    if constexpr (Traits::kPacked) {
      const Mask mask = sink.mask(params, shared.barriers);
      consume_tile<Traits>(params, shared, sink, mask, consumer, thread, k_ring, v_ring, {q_phase},
                           none, none);
    } else {
      consume_tile<Traits>(params, shared, sink, params.mask, consumer, thread, k_ring, v_ring,
                           {q_phase}, none, none);
    }
    sink.release(shared.barriers);
    q_phase ^= 1;
  }
}

// The same with ahead_first: a tile's first product is issued under the epilogue of the one before.
// After the last tile it multiplies what lies in the buffers, for nobody: a branch would cost more.
template <class Traits>
CUTE_DEVICE void consume_tiles_ahead(ForwardParams const& params,
                                     typename Traits::SharedStorage& shared, int consumer,
                                     int thread) {
  using namespace cute;
  auto& barriers = shared.barriers;
  TileSink<Traits> sink;
  Ring<Traits::kStages> k_ring, v_ring;
  QRing<Traits> q_ring;
  typename Traits::MmaQK mma;
  auto thread_mma = mma.get_thread_slice(0);
  Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutK{});
  Tensor tSrK = thread_mma.partition_fragment_B(sK);
  Tensor rS = make_scores<Traits>();
  auto issue_first = [&](bool exists) {
    const int q_buffer = q_index<Traits>(q_ring, consumer);
    if (exists) {
      barriers.q_full[q_buffer].wait(q_ring.phase);
      barriers.k_full[k_ring.stage].wait(k_ring.phase);
    }
    Tensor sQ = make_tensor(make_smem_ptr(shared.q[q_buffer]), typename Traits::LayoutQ{});
    Tensor tSrQ = thread_mma.partition_fragment_A(sQ);
    issue_product<true>(mma, tSrQ, tSrK(_, _, _, k_ring.stage), rS);
  };
  bool more = sink.next(barriers);
  issue_first(more);
  auto issue_next = [&] {
    q_ring.advance();
    more = sink.has_next(barriers);
    issue_first(more);
  };
  while (more) {
    if constexpr (Traits::kPacked) {
      const Mask mask = sink.mask(params, barriers);
      consume_tile<Traits>(params, shared, sink, mask, consumer, thread, k_ring, v_ring, q_ring, rS,
                           issue_next);
    } else {
      consume_tile<Traits>(params, shared, sink, params.mask, consumer, thread, k_ring, v_ring,
                           q_ring, rS, issue_next);
    }
    sink.release(barriers);
  }
  warpgroup_wait<0>();
}

template <class Traits>
CUTE_DEVICE void consume(ForwardParams const& params, typename Traits::SharedStorage& shared,
                         int consumer) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  Turns<Traits, Traits::kConfig.ping_pong || Traits::kConfig.exp_turns>{consumer}.start();
  if constexpr (Traits::kConfig.ahead_first) {
    consume_tiles_ahead<Traits>(params, shared, consumer, thread);
  } else {
    consume_tiles<Traits>(params, shared, consumer, thread);
  }
  if (thread == 0) cute::tma_store_wait<0>();  // shared memory lives until TMA has read it
}

template <class Instance>
__global__ void __launch_bounds__(TraitsOf<Instance>::kThreads, 1)
    forward_kernel(__grid_constant__ const ForwardParams params) {
  using Traits = TraitsOf<Instance>;
  constexpr RegisterSplit kSplit = register_split(Traits::kConsumers);
  extern __shared__ __align__(1024) unsigned char shared_bytes_begin[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes_begin);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&params.q);
    cute::prefetch_tma_descriptor(&params.k);
    cute::prefetch_tma_descriptor(&params.v);
    cute::prefetch_tma_descriptor(&params.out);
    const bool transpose = Traits::kMayTranspose && !params.v_transposed;
    bool o_on_q = false;
    if constexpr (Traits::kFp8) o_on_q = Traits::o_on_q(params.v_transposed);
    init_barriers<Traits>(shared.barriers, transpose ? kTransposeWarps : 0, o_on_q);
  }
  if constexpr (Traits::kFp8) {
    if constexpr (Traits::kOnes) write_ones<Traits>(shared);
  }
  if constexpr (Traits::kPacked) {
    if (threadIdx.x == 32) find_start<Traits>(params, shared.barriers);
  }
  sync_start<Traits>();
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
