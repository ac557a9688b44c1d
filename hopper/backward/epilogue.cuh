// dK and dV of one consumer's keys: registers, 16 bits, shared memory, TMA.
#pragma once

#include "backward/clustered_mma.cuh"
#include "backward/late_mma.cuh"
#include "backward/thirds_mma.cuh"

namespace hopper_attention {

// Where a block's rows of dK and dV go.
struct GradientPlace {
  RowOrigin origin;
  int row;
  int head;
  int wrap;  // of ragged tensors
  int used;  // rows of keys that are used; the others, if they are the sequence's, become 0
};

template <class Traits>
CUTE_DEVICE GradientPlace gradient_place(KeyTile const& tile,
                                         typename Traits::SharedStorage const& shared) {
  if constexpr (Traits::kRagged) {  // anew: it need not have been kept
    const SharedTile now = load_tile(shared.tile[0]);
    const int row = now.n_block * Traits::kTileN;
    return {now.dk, row, now.head_kv, now.wrap, now.seqlen_k - row};
  } else {
    return {tile.k, tile.n_block * Traits::kTileN, tile.head_kv, 0, Traits::kTileN};
  }
}

template <class Traits, class Element>
CUTE_DEVICE void store_slab(CUtensorMap const& map, Element const* from, int column, int row,
                            GradientPlace const& place) {
  if constexpr (Traits::kRagged) {
    cute::SM90_TMA_STORE_5D::copy(&map, from, column, row, place.head, place.origin.shift,
                                  place.wrap);
  } else {
    cute::SM90_TMA_STORE_4D::copy(&map, from, column, row, place.head, place.origin.shift);
  }
}

// Stores rows part * kConsumerRows and on of a gradient. kRows: rows of the whole buffer, which
// lies in slabs.
template <class Traits, class Layout, int kSlab, int kColumns, class TiledMma, class Element,
          class Gradient>
CUTE_DEVICE void store_gradient(CUtensorMap const& map, TiledMma const& mma, Element* buffer,
                                Gradient& gradient, float scale, GradientPlace const& place,
                                int consumer, int part, int thread) {
  using namespace cute;
  constexpr int kRows = Traits::kTileN;
  CUTE_UNROLL
  for (int i = 0; i < decltype(size(gradient))::value; ++i) gradient(i) *= scale;
  if constexpr (Traits::kRagged) {
    const int row = part * kConsumerRows + thread / 32 * 16 + thread % 32 / 4;
    if (place.used < kRows) {
      CUTE_UNROLL
      for (int i = 0; i < decltype(size(gradient))::value; ++i) {
        if (row + 8 * fragment_row(i) >= place.used) gradient(i) = 0.0f;
      }
    }
  }
  Tensor rounded = make_tensor<Element>(gradient.layout());
  convert_fragment<Element>(gradient, rounded);
  Tensor shared = make_tensor(make_smem_ptr(buffer), Layout{});
  auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, mma);
  auto thread_copy = copy_out.get_thread_slice(part * kWarpgroupThreads + thread);
  copy(copy_out, thread_copy.retile_S(rounded), thread_copy.partition_D(shared));
  tma_store_fence();  // what TMA reads was written by ordinary stores
  sync_consumer(consumer);
  if (thread != 0) return;
  const int row = place.origin.row + place.row + part * kConsumerRows;
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kSlab) {
    const Element* from = buffer + column * kRows + part * kConsumerRows * kSlab;
    store_slab<Traits>(map, from, column, row, place);
  }
  tma_store_arrive();
}

// dV takes V's place, of which a consumer reads no rows but its own.
template <class Traits, class GradientV>
CUTE_DEVICE void store_dv(BackwardParams const& params, KeyTile const& tile,
                          typename Traits::SharedStorage& shared, int consumer, int part,
                          int thread, GradientV& rdV) {
  store_gradient<Traits, typename Traits::LayoutV, Traits::kSlabV, Traits::kHeadDimV>(
      params.dv, typename Traits::MmaDv{}, shared.v, rdV, 1.0f,
      gradient_place<Traits>(tile, shared), consumer, part, thread);
}

// dK takes K's, when all consumers have read it for dQ.
template <class Traits, class GradientK>
CUTE_DEVICE void store_dk(BackwardParams const& params, KeyTile const& tile,
                          typename Traits::SharedStorage& shared, int consumer, int part,
                          int thread, GradientK& rdK) {
  store_gradient<Traits, typename Traits::LayoutK, Traits::kSlabK, Traits::kHeadDim>(
      params.dk, typename Traits::MmaDk{}, shared.k, rdK, params.softmax_scale,
      gradient_place<Traits>(tile, shared), consumer, part, thread);
}

// All keys of the columns of a gradient that are a consumer's, transposed: (columns x keys).
template <class Traits, bool kValues, class Gradient>
CUTE_DEVICE void store_part(BackwardParams const& params, KeyTile const& tile,
                            typename Traits::SharedStorage& shared, int consumer, int thread,
                            Gradient& gradient) {
  using namespace cute;
  using Element = typename Traits::Element;
  using Part = PartTraits<Traits>;
  constexpr int kRows = Traits::kTileN;
  constexpr int kAllColumns = kValues ? Traits::kHeadDimV : Traits::kHeadDim;
  constexpr int kParts = gradient_parts(Traits::kConfig, kAllColumns);
  constexpr int kColumns = kAllColumns / kParts;
  constexpr int kSlab = kValues ? Traits::kSlabV : Traits::kSlabK;
  const int part = kParts == 1 ? 0 : consumer;
  Element* const buffer = kValues ? shared.v : shared.k;
  const GradientPlace place = gradient_place<Traits>(tile, shared);
  const float scale = kValues ? 1.0f : params.softmax_scale;
  const int first_key = thread % 4 * 2;
  CUTE_UNROLL
  for (int i = 0; i < decltype(size(gradient))::value; ++i) {
    // Tiles of 64 columns lie one after the other in the fragment.
    const int key = fragment_column(i % (kRows / 2)) + first_key;
    gradient(i) = Traits::kRagged && key >= place.used ? 0.0f : gradient(i) * scale;
  }
  Tensor rounded = make_tensor<Element>(gradient.layout());
  convert_fragment<Element>(gradient, rounded);
  using LayoutStored =
      cute::conditional_t<kValues, typename Part::LayoutDvt, typename Part::LayoutDkt>;
  Tensor stored = make_tensor(make_smem_ptr(buffer), LayoutStored{});
  using MmaGradient = typename Part::template MmaGradient<kValues>;
  auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U16x8_STSM_T, Element>{}, MmaGradient{});
  auto thread_copy = copy_out.get_thread_slice(part * kWarpgroupThreads + thread);
  copy(copy_out, thread_copy.retile_S(rounded), thread_copy.partition_D(stored));
  tma_store_fence();  // what TMA reads was written by ordinary stores
  sync_consumer(consumer);
  if (thread != 0) return;
  CUTE_UNROLL
  for (int i = 0; i < kColumns; i += kSlab) {
    const int column = part * kColumns + i;
    store_slab<Traits>(kValues ? params.dv : params.dk, buffer + column * kRows, column,
                       place.origin.row + place.row, place);
  }
  tma_store_arrive();
}

}  // namespace hopper_attention
