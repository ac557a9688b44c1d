// dK and dV of one consumer's keys: registers, 16 bits, shared memory, TMA.
#pragma once

#include "backward/paired_mma.cuh"

namespace hopper_attention {

// Stores rows part * kConsumerRows and on of a gradient. kRows: rows of the whole buffer, which
// lies in slabs.
template <class Layout, int kSlab, int kColumns, int kRows, class TiledMma, class Element,
          class Gradient>
CUTE_DEVICE void store_gradient(CUtensorMap const& map, TiledMma const& mma, Element* buffer,
                                Gradient& gradient, float scale, KeyTile const& tile, int consumer,
                                int part, int thread) {
  using namespace cute;
  CUTE_UNROLL
  for (int i = 0; i < decltype(size(gradient))::value; ++i) gradient(i) *= scale;
  Tensor rounded = make_tensor<Element>(gradient.layout());
  convert_fragment<Element>(gradient, rounded);
  Tensor shared = make_tensor(make_smem_ptr(buffer), Layout{});
  auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, mma);
  auto thread_copy = copy_out.get_thread_slice(part * kWarpgroupThreads + thread);
  copy(copy_out, thread_copy.retile_S(rounded), thread_copy.partition_D(shared));
  tma_store_fence();  // what TMA reads was written by ordinary stores
  sync_consumer(consumer);
  if (thread != 0) return;
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    SM90_TMA_STORE_4D::copy(&map, buffer + column * kRows + part * kConsumerRows * kSlab, column,
                            tile.n_block * kRows + part * kConsumerRows, tile.head_kv, tile.batch);
  }
  tma_store_arrive();
}

// dV takes V's place, of which a consumer reads no rows but its own.
template <class Traits, class GradientV>
CUTE_DEVICE void store_dv(BackwardParams const& params, KeyTile const& tile,
                          typename Traits::SharedStorage& shared, int consumer, int part,
                          int thread, GradientV& rdV) {
  store_gradient<typename Traits::LayoutV, Traits::kSlabV, Traits::kHeadDimV, Traits::kTileN>(
      params.dv, typename Traits::MmaDv{}, shared.v, rdV, 1.0f, tile, consumer, part, thread);
}

// dK takes K's, when all consumers have read it for dQ.
template <class Traits, class GradientK>
CUTE_DEVICE void store_dk(BackwardParams const& params, KeyTile const& tile,
                          typename Traits::SharedStorage& shared, int consumer, int part,
                          int thread, GradientK& rdK) {
  store_gradient<typename Traits::LayoutK, Traits::kSlabK, Traits::kHeadDim, Traits::kTileN>(
      params.dk, typename Traits::MmaDk{}, shared.k, rdK, params.softmax_scale, tile, consumer,
      part, thread);
}

}  // namespace hopper_attention
