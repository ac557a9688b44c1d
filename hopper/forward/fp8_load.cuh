// The producer's part that is e4m3's own: V, which the second product reads with contiguous keys.
// It comes so from memory, or as rows of tokens that two warps transpose in shared memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include "common/stmatrix.cuh"
#include "forward/fp8_traits.cuh"
#include "forward/load.cuh"

namespace hopper_attention {

// V's loads of one block, as produce_keys_values asks for them.
template <class Traits>
struct Fp8ValueLoader {
  Ring<Traits::kStages> ring;
  Ring<kRawStages> raw_ring;

  CUTE_DEVICE void load(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        int n_block, int head, int batch) {
    using cute::TMA::CacheHintSm90;
    auto& barriers = shared.barriers;
    if constexpr (Traits::kMayTranspose) {
      if (!params.v_transposed) {
        barriers.raw_empty[raw_ring.stage].wait(raw_ring.phase ^ 1);
        load_tile<Traits::kSlab, Traits::kHeadDimV, Traits::kTileN>(
            params.v, barriers.raw_full[raw_ring.stage], CacheHintSm90::EVICT_LAST,
            shared.raw[raw_ring.stage], n_block * Traits::kTileN, head, batch);
        raw_ring.advance();
        return;
      }
    }
    barriers.v_empty[ring.stage].wait(ring.phase ^ 1);
    auto& full = barriers.v_full[ring.stage];
    full.arrive_and_expect_tx(Traits::kTileN * Traits::kHeadDimV);
    cute::SM90_TMA_LOAD_4D::copy(&params.v, reinterpret_cast<std::uint64_t*>(&full),
                                 static_cast<std::uint64_t>(CacheHintSm90::EVICT_LAST),
                                 shared.v[ring.stage], n_block * Traits::kTileN, 0, head, batch);
    ring.advance();
  }
};

CUTE_DEVICE void load_transposed(void const* address, std::uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(cute::cast_smem_ptr_to_uint(address))
               : "memory");
}

// Transposes 32 keys of 16 channels, seen as 16-bit pairs of channels. ldmatrix's transposition
// gives a thread the pair of channels lane / 4 of keys 2a, 2a + 1 and 8 + 2a, 9 + 2a (a = lane %
// 4): once the bytes of the two channels are taken apart, these are slots 4a to 4a + 3 of fp8.h.
template <class TensorRaw, class TensorVt>
CUTE_DEVICE void transpose_block(TensorRaw const& sRaw, TensorVt& sVt, int first_key, int channel) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, i = lane % 8;
  std::uint32_t pairs[4], bytes[4];
  load_transposed(&sRaw(first_key + 8 * matrix + i, channel), pairs);
  CUTE_UNROLL
  for (int group = 0; group < 2; ++group) {
    bytes[2 * group] = __byte_perm(pairs[2 * group], pairs[2 * group + 1], 0x6420);
    bytes[2 * group + 1] = __byte_perm(pairs[2 * group], pairs[2 * group + 1], 0x7531);
  }
  auto* const to = &sVt(channel + 2 * i + matrix % 2, first_key + kSlots * (matrix / 2));
  store_matrices(cute::cast_smem_ptr_to_uint(to), bytes);
}

// One of kTransposeWarps warps: follows the tiles and transposes each block that arrives.
template <class Traits>
CUTE_DEVICE void transpose_values(ForwardParams const& params,
                                  typename Traits::SharedStorage& shared, int warp) {
  using namespace cute;
  auto& barriers = shared.barriers;
  Ring<Traits::kStages> ring;
  Ring<kRawStages> raw_ring;
  TileSink<Traits> sink;
  Tensor sRaw = make_tensor(make_smem_ptr(shared.raw[0]), typename Traits::LayoutRaw{});
  Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), typename Traits::LayoutVt{});
  while (sink.next(barriers)) {
    const BlockRange blocks = visited_blocks<Traits>(params.mask, sink.tile(barriers).tile);
    sink.release(barriers);
    for (int n_block = blocks.begin; n_block < blocks.end; ++n_block) {  // their number counts
      barriers.raw_full[raw_ring.stage].wait(raw_ring.phase);
      barriers.v_empty[ring.stage].wait(ring.phase ^ 1);
      Tensor raw = sRaw(_, _, raw_ring.stage);
      Tensor vt = sVt(_, _, ring.stage);
      constexpr int kChunks = Traits::kHeadDimV / 16;
      CUTE_NO_UNROLL
      for (int unit = warp; unit < kChunks * (Traits::kTileN / 32); unit += kTransposeWarps) {
        transpose_block(raw, vt, unit / kChunks * 32, unit % kChunks * 16);
      }
      cutlass::arch::fence_view_async_shared();  // WGMMA reads what ordinary stores wrote
      __syncwarp();
      if (elect_one_sync()) {
        barriers.v_full[ring.stage].arrive();
        barriers.raw_empty[raw_ring.stage].arrive();
      }
      __syncwarp();
      ring.advance();
      raw_ring.advance();
    }
  }
}

// The row of ones, written once: no load touches it.
template <class Traits>
CUTE_DEVICE void write_ones(typename Traits::SharedStorage& shared) {
  constexpr std::uint32_t kFourOnes = 0x38383838;  // e4m3's 1, four times
  constexpr int kWords = kOnesRows * Traits::kTileN / 4;
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    auto* words =
        reinterpret_cast<std::uint32_t*>(shared.v[stage] + Traits::kHeadDimV * Traits::kTileN);
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) words[i] = kFourOnes;
  }
  cutlass::arch::fence_view_async_shared();
}

}  // namespace hopper_attention
