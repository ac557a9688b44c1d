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
                                         typename Traits::SharedStorage const& shared,
                                         int slot = 0) {
  if constexpr (Traits::kRagged) {  // anew: it need not have been kept
    const SharedTile now = load_tile(shared.tile[slot]);
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

// Writes rows part * kConsumerRows and on of a gradient into a buffer. used: of the buffer's rows.
template <class Traits, class Layout, class TiledMma, class Element, class Gradient>
CUTE_DEVICE void write_gradient(TiledMma const& mma, Element* buffer, Gradient& gradient,
                                float scale, int used, int part, int thread) {
  using namespace cute;
  CUTE_UNROLL
  for (int i = 0; i < decltype(size(gradient))::value; ++i) gradient(i) *= scale;
  if constexpr (Traits::kRagged) {
    const int row = fragment_first_row(thread, part * kConsumerRows);
    if (used < Traits::kTileN) {
      CUTE_UNROLL
      for (int i = 0; i < decltype(size(gradient))::value; ++i) {
        if (row + 8 * fragment_row(i) >= used) gradient(i) = 0.0f;
      }
    }
  }
  Tensor rounded = make_tensor<Element>(gradient.layout());
  convert_fragment<Element>(gradient, rounded);
  Tensor shared = make_tensor(make_smem_ptr(buffer), Layout{});
  auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, mma);
  auto thread_copy = copy_out.get_thread_slice(part * kWarpgroupThreads + thread);
  copy(copy_out, thread_copy.retile_S(rounded), thread_copy.partition_D(shared));
}

// Stores rows part * kConsumerRows and on of a gradient, which begin at `from` and lie in slabs,
// kStride elements from one to the next; one thread.
template <class Traits, int kSlab, int kColumns, int kStride, class Element>
CUTE_DEVICE void send_slabs(CUtensorMap const& map, Element const* from, GradientPlace const& place,
                            int part) {
  const int row = place.origin.row + place.row + part * kConsumerRows;
  CUTE_UNROLL
  for (int i = 0; i < kColumns / kSlab; ++i) {
    store_slab<Traits>(map, from + i * kStride, i * kSlab, row, place);
  }
  cute::tma_store_arrive();
}
// Likewise of one in K's or V's place.
template <class Traits, int kSlab, int kColumns, class Element>
CUTE_DEVICE void send_gradient(CUtensorMap const& map, Element const* buffer,
                               GradientPlace const& place, int part) {
  send_slabs<Traits, kSlab, kColumns, Traits::kTileN * kSlab>(
      map, buffer + part * kConsumerRows * kSlab, place, part);
}

// dV of the first of a pair takes V's place.
template <class Traits, class GradientV>
CUTE_DEVICE void store_dv(BackwardParams const& params, KeyTile const& tile,
                          typename Traits::SharedStorage& shared, int thread, GradientV& rdV) {
  const GradientPlace place = gradient_place<Traits>(tile, shared);
  write_gradient<Traits, typename Traits::LayoutV>(typename Traits::MmaDv{}, shared.v[0], rdV, 1.0f,
                                                   place.used, 0, thread);
  cute::tma_store_fence();  // what TMA reads was written by ordinary stores
  sync_consumer(0);
  if (thread != 0) return;
  send_gradient<Traits, Traits::kSlabV, Traits::kHeadDimV>(params.dv, shared.v[0], place, 0);
}

// dK of the second one K's, when both have read it for dQ.
template <class Traits, class GradientK>
CUTE_DEVICE void store_dk(BackwardParams const& params, KeyTile const& tile,
                          typename Traits::SharedStorage& shared, int thread, GradientK& rdK) {
  const GradientPlace place = gradient_place<Traits>(tile, shared);
  write_gradient<Traits, typename Traits::LayoutK>(typename Traits::MmaDk{}, shared.k[0], rdK,
                                                   params.softmax_scale, place.used, 0, thread);
  cute::tma_store_fence();
  sync_consumer(1);
  if (thread != 0) return;
  send_gradient<Traits, Traits::kSlabK, Traits::kHeadDim>(params.dk, shared.k[0], place, 0);
}

// The gradients of one of the consumers alike, for the storing warp. dV takes V's place, of which a
// consumer reads no rows but its own, or, where the next tile's V comes there, dS's, when the last
// tile's dV has left; dK takes K's. Those two come when all consumers have multiplied the last dQ.
template <class Traits, class GradientK, class GradientV>
CUTE_DEVICE void hand_over(BackwardParams const& params, KeyTile const& tile,
                           typename Traits::SharedStorage& shared, int slot, int consumer,
                           int thread, GradientK& rdK, GradientV& rdV) {
  const int used = gradient_place<Traits>(tile, shared, slot).used;
  auto& barriers = shared.barriers;
  if constexpr (Traits::kSharedValues) {
    barriers.gradients_read[0].wait(slot ^ 1);
    sync_consumers(Traits::kConsumers);
  }
  typename Traits::Element* const dv = Traits::kSharedValues ? shared.ds[0] : shared.v[slot];
  write_gradient<Traits, typename Traits::LayoutDv>(typename Traits::MmaDv{}, dv, rdV, 1.0f, used,
                                                    consumer, thread);
  if constexpr (!Traits::kSharedValues) sync_consumers(Traits::kConsumers);
  write_gradient<Traits, typename Traits::LayoutK>(typename Traits::MmaDk{}, shared.k[slot], rdK,
                                                   params.softmax_scale, used, consumer, thread);
  cute::tma_store_fence();
  __syncwarp();
  arrive_warp(barriers.gradients_full[slot]);
}

// One thread: stores what consumers hand over.
template <class Traits>
CUTE_DEVICE void store_gradients(BackwardParams const& params,
                                 typename Traits::SharedStorage& shared) {
  for (TileSink<Traits> tiles; tiles.next(shared); tiles.slot.advance()) {
    const int slot = tiles.slot.stage;
    const GradientPlace place = gradient_place<Traits>(tiles.tile(shared), shared, slot);
    shared.barriers.gradients_full[slot].wait(tiles.slot.phase);
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      if constexpr (Traits::kSharedValues) {
        send_slabs<Traits, Traits::kSlabV, Traits::kHeadDimV, Traits::kDsElements>(
            params.dv, shared.ds[0] + consumer * Traits::kOwnDsElements, place, consumer);
      } else {
        send_gradient<Traits, Traits::kSlabV, Traits::kHeadDimV>(params.dv, shared.v[slot], place,
                                                                 consumer);
      }
    }
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      send_gradient<Traits, Traits::kSlabK, Traits::kHeadDim>(params.dk, shared.k[slot], place,
                                                              consumer);
    }
    if constexpr (Traits::kSharedValues) {
      cute::tma_store_wait<Traits::kConsumers>();
      shared.barriers.gradients_read[0].arrive();
    }
    cute::tma_store_wait<0>();  // the tile after the next may have the place when TMA has read it
    tiles.release(shared);
  }
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
  Element* const buffer = kValues ? shared.v[0] : shared.k[0];
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
  Tensor stored =
      as_position_independent_swizzle_tensor(make_tensor(make_smem_ptr(buffer), LayoutStored{}));
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
