// Everything that a config settles at compile time: layouts, MMA atoms, shared storage.
#pragma once

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "common/barriers.cuh"
#include "hopper_attention/budget.h"
#include "hopper_attention/packed.h"

namespace hopper_attention {

// What the producer tells everyone about a tile: finding it takes divisions, which one thread does.
struct alignas(kTileMessageBytes) TileMessage {
  WorkTile tile;
  int head_kv;  // negative: there are no more tiles
};
static_assert(sizeof(TileMessage) == kTileMessageBytes, "one 16-byte load");
static_assert(sizeof(TileSequence) == kTileSequenceBytes, "one 16-byte load");

// Instance is a struct with `static constexpr ForwardConfig kConfig`.
template <class Instance>
struct ForwardTraits {
  static constexpr ForwardConfig kConfig = Instance::kConfig;
  static_assert(config_error(kConfig) == nullptr, "a config that cannot be built");

  using Element =
      cute::conditional_t<kConfig.key.dtype == Dtype::kFloat16, cute::half_t, cute::bfloat16_t>;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kHeadDim = kConfig.key.head_dim;
  static constexpr int kHeadDimV = kConfig.key.head_dim_v;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kTileSlots = tile_slots(kConfig);
  static constexpr int kConsumers = kConfig.num_consumers;
  static constexpr int kQBuffers = q_stages(kConfig) * kConsumers;  // see q_index
  static constexpr int kCluster = kConfig.cluster;
  static constexpr bool kPacked = is_packed(kConfig);
  static constexpr bool kMasked = kConfig.key.mask != MaskKind::kFull;
  static constexpr bool kFp8 = false;
  static constexpr bool kMayTranspose = false;
  static constexpr bool kOOnV = o_overlays_v(kConfig);
  static constexpr int kThreads = num_threads(kConfig);
  static constexpr int kSlab = slab_columns(kHeadDim, sizeof(Element));
  static constexpr int kSlabV = slab_columns(kHeadDimV, sizeof(Element));

  using M = cute::Int<kConsumerRows>;
  using N = cute::Int<kTileN>;
  using NarrowN = cute::Int<kConfig.narrow_first ? kNarrowKeys : kTileN>;
  using D = cute::Int<kHeadDim>;
  using Dv = cute::Int<kHeadDimV>;

  // Slabs of `columns` head dimensions, swizzled, one after the other: what TMA's boxes write.
  template <int columns>
  using AtomK = cute::conditional_t<columns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                    cute::GMMA::Layout_K_SW64_Atom<Element>>;
  template <int columns>
  using AtomMN = cute::conditional_t<columns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                     cute::GMMA::Layout_MN_SW64_Atom<Element>>;
  using LayoutQ = decltype(cute::tile_to_shape(AtomK<kSlab>{}, cute::Shape<M, D>{}));
  using LayoutK =
      decltype(cute::tile_to_shape(AtomK<kSlab>{}, cute::Shape<N, D, cute::Int<kStages>>{}));
  // V lies as (tokens, head_dim_v) in memory; the second product reads it as its transpose.
  using LayoutVt =
      decltype(cute::tile_to_shape(AtomMN<kSlabV>{}, cute::Shape<Dv, N, cute::Int<kStages>>{},
                                   cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using LayoutO = decltype(cute::tile_to_shape(AtomK<kSlabV>{}, cute::Shape<M, Dv>{}));

  using MmaQK = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<M, N, D>>()));
  using MmaNarrow = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<M, NarrowN, D>>()));
  using MmaPV = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<M, Dv, N>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  static constexpr int kQElements = kConsumerRows * kHeadDim;   // one consumer's
  static constexpr int kOElements = kConsumerRows * kHeadDimV;  // one consumer's
  static constexpr int kKElements = kTileN * kHeadDim;          // one stage's
  static constexpr int kVElements = kTileN * kHeadDimV;

  struct Barriers {
    FullBarrier q_full[kQBuffers];
    FullBarrier k_full[kStages];
    FullBarrier v_full[kStages];
    EmptyBarrier q_empty[kQBuffers];
    EmptyBarrier k_empty[kStages];
    EmptyBarrier v_empty[kStages];
    FullBarrier
        v_tail[kPacked ? kStages + kStages % 2 : 0];   // V whose last rows wait to be cleared
    EmptyBarrier o_sent[kConsumers + kConsumers % 2];  // O has left: V's buffers are free
    EmptyBarrier k_ready[kCluster > 1 ? kStages : 0];  // the cluster's other block waits for K
    EmptyBarrier v_ready[kCluster > 1 ? kStages : 0];
    EmptyBarrier tile_full[kTileSlots];
    EmptyBarrier tile_empty[kTileSlots];
    TileMessage tiles[kTileSlots];
    TileSequence sequences[kPacked ? kTileSlots : 0];
  };

  struct alignas(kSharedAlignment) SharedStorage {
    Element k[kStages][kKElements];
    Element v[kStages][kVElements];
    Element q[kQBuffers][kQElements];
    Element o_tail[kOOnV ? 8 : kConsumers * kOElements];
    Barriers barriers;

    CUTE_DEVICE Element* o(int consumer) { return (kOOnV ? v[0] : o_tail) + consumer * kOElements; }
  };
  static_assert(sizeof(SharedStorage) == shared_bytes(kConfig), "budget.h counts every byte");
  static_assert(kConsumers * kOElements <= kStages * kVElements, "O fits where V was");
};

}  // namespace hopper_attention
