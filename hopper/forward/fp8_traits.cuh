// What an e4m3 config settles at compile time, with the names of ForwardTraits.
#pragma once

#include "forward/traits.cuh"
#include "hopper_attention/fp8.h"

namespace hopper_attention {

template <class Instance>
struct Fp8Traits {
  static constexpr ForwardConfig kConfig = Instance::kConfig;
  static_assert(config_error(kConfig) == nullptr, "a config that cannot be built");

  using Element = cute::float_e4m3_t;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kHeadDim = kConfig.key.head_dim;
  static constexpr int kHeadDimV = kConfig.key.head_dim_v;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kTileSlots = tile_slots(kConfig);
  static constexpr int kConsumers = kConfig.num_consumers;
  static constexpr int kCluster = kConfig.cluster;
  static constexpr bool kMasked = kConfig.key.mask == MaskKind::kMasked;
  static constexpr bool kPacked = false;
  static constexpr bool kFp8 = true;
  static constexpr bool kFast = kConfig.key.dtype == Dtype::kE4M3Fast;
  static constexpr bool kOnes = sums_by_ones(kConfig);
  static constexpr bool kMayTranspose = may_transpose(kConfig);
  static constexpr bool kTokenSums = keeps_row_sums(kConfig);
  static constexpr bool kOOnV = false;
  static constexpr bool kOverlayO = o_overlays_q(kConfig);
  static constexpr bool kRawHoldsO = raw_holds_o(kConfig);
  static constexpr int kORounds = o_rounds(kConfig);
  static constexpr int kThreads = num_threads(kConfig);
  static constexpr int kSlab = slab_columns(kHeadDim, 1);  // of Q, K and rows of V
  static constexpr int kSlabO = slab_columns(kHeadDimV, 2);
  static constexpr int kParts = kConfig.v_parts;
  static constexpr int kOnesColumns = kOnes ? kOnesRows : 0;
  static constexpr int kPartColumns = kHeadDimV / kParts;  // of P V
  static constexpr int kLastColumns = kPartColumns + kOnesColumns;
  static constexpr bool kSumsInO = kOnes && kParts == 1;  // else the softmax keeps them
  static constexpr int kOColumns = kHeadDimV + (kSumsInO ? kOnesColumns : 0);
  static constexpr int kVRows = kHeadDimV + kOnesColumns;  // of V transposed

  using M = cute::Int<kConsumerRows>;
  using N = cute::Int<kTileN>;
  using D = cute::Int<kHeadDim>;
  using Dv = cute::Int<kHeadDimV>;

  template <int bytes>
  using AtomK =
      cute::conditional_t<bytes == 128, cute::GMMA::Layout_K_SW128_Atom<Element>,
                          cute::conditional_t<bytes == 64, cute::GMMA::Layout_K_SW64_Atom<Element>,
                                              cute::GMMA::Layout_K_SW32_Atom<Element>>>;
  using LayoutQ = decltype(cute::tile_to_shape(AtomK<kSlab>{}, cute::Shape<M, D>{}));
  using LayoutK =
      decltype(cute::tile_to_shape(AtomK<kSlab>{}, cute::Shape<N, D, cute::Int<kStages>>{}));
  // V as the second product reads it: channels, then the row of ones, each with contiguous keys.
  using LayoutVt = decltype(cute::tile_to_shape(
      AtomK<kTileN>{}, cute::Shape<cute::Int<kVRows>, N, cute::Int<kStages>>{}));
  // The channels of the last part and the ones, from their first on.
  using LayoutLastStage =
      decltype(cute::tile_to_shape(AtomK<kTileN>{}, cute::Shape<cute::Int<kLastColumns>, N>{}));
  using LayoutLastVt = decltype(cute::make_composed_layout(
      LayoutLastStage{}.layout_a(), LayoutLastStage{}.offset(),
      cute::append(LayoutLastStage{}.layout_b(),
                   cute::Layout<cute::Int<kStages>, cute::Int<kTileN * kVRows>>{})));
  // V as rows of tokens, which wait to be transposed.
  using LayoutRaw =
      decltype(cute::tile_to_shape(AtomK<kSlab>{}, cute::Shape<N, Dv, cute::Int<kRawStages>>{}));

  using MmaQK = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<M, N, D>>()));
  template <int columns>
  using MmaPVOf = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<M, cute::Int<columns>, N>>()));
  using MmaPart = MmaPVOf<kPartColumns>;
  using MmaPV = MmaPVOf<kLastColumns>;  // the last part's, which may be all

  // Columns of O that leave at a time, in 16 bits.
  static constexpr int kRoundColumns = kHeadDimV / kORounds;
  static constexpr int kQElements = kConsumerRows * kHeadDim;  // one consumer's
  static constexpr int kRoundElements = kConsumerRows * kRoundColumns;
  static constexpr int kKElements = kTileN * kHeadDim;  // one stage's
  static constexpr int kVElements = kTileN * kVRows;

  // Whether O leaves by way of Q, which is not free before.
  CUTE_HOST_DEVICE static constexpr bool o_on_q(bool v_transposed) {
    return kOverlayO && !(kRawHoldsO && v_transposed);
  }

  struct Barriers {
    FullBarrier q_full[kConsumers];
    FullBarrier k_full[kStages];
    FullBarrier v_full[kStages];
    FullBarrier raw_full[kMayTranspose ? kRawStages : 0];
    EmptyBarrier q_empty[kConsumers];
    EmptyBarrier k_empty[kStages];
    EmptyBarrier v_empty[kStages];
    EmptyBarrier raw_empty[kMayTranspose ? kRawStages : 0];
    EmptyBarrier tile_full[kTileSlots];
    EmptyBarrier tile_empty[kTileSlots];
    TileMessage tiles[kTileSlots];
  };

  struct alignas(kSharedAlignment) SharedStorage {
    Element k[kStages][kKElements];
    Element v[kStages][kVElements];
    Element raw[kMayTranspose ? kRawStages : 0][kTileN * kHeadDimV];
    Element q[kConsumers][kQElements];
    cute::half_t o_own[kOverlayO ? 0 : kConsumers][kRoundElements];
    // Row sums of P where V's tokens have scales, which the row of ones would take in. Behind what
    // is swizzled, whose addresses are multiples of its period.
    float row_sums[kTokenSums ? kConsumers : 0][kConsumerRows];
    Barriers barriers;

    // v_transposed: no V waits to be transposed, and its buffers may hold O.
    CUTE_DEVICE cute::half_t* o(int consumer, bool v_transposed) {
      if constexpr (kOverlayO) {
        if (o_on_q(v_transposed)) return reinterpret_cast<cute::half_t*>(q[consumer]);
        return reinterpret_cast<cute::half_t*>(raw[0]) + consumer * kConsumerRows * kHeadDimV;
      }
      return o_own[consumer];
    }
  };
  static_assert(sizeof(SharedStorage) == shared_bytes(kConfig), "budget.h counts every byte");
};

template <class Instance>
using TraitsOf = cute::conditional_t<is_fp8(Instance::kConfig.key.dtype), Fp8Traits<Instance>,
                                     ForwardTraits<Instance>>;

}  // namespace hopper_attention
