// Everything that a backward config settles at compile time: layouts, MMA atoms, shared storage.
//
// All products have K's rows, the keys, or dQ's as the tile's M; those of part_mma.cuh have
// others. With a block's keys as rows, P and dS come out of S^T = K Q^T and dP^T = V dO^T as the
// register operands of dV = P^T dO and dK = dS^T Q; only dQ = dS K, which sums over the keys of all
// consumers, reads dS from shared memory.
#pragma once

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "common/barriers.cuh"
#include "hopper_attention/backward_budget.h"
#include "hopper_attention/dq_layout.h"
#include "hopper_attention/ragged.h"

namespace hopper_attention {

// What the warps of a block are told of a tile: its KeyTile, and its sequence's lengths.
struct alignas(16) SharedTile {
  int n_block;
  int head_kv;  // negative: nothing to do
  int first_block;
  int wrap;
  RowOrigin q;
  RowOrigin k;
  RowOrigin dk;
  int seqlen_q;
  int seqlen_k;
  // Of persistent blocks, which have it ready.
  BlockRange m_blocks;
  int steps;  // 0: no query sees the keys
  int unused;
};

// Instance is a struct with `static constexpr BackwardConfig kConfig`.
template <class Instance>
struct BackwardTraits {
  static constexpr BackwardConfig kConfig = Instance::kConfig;
  static_assert(config_error(kConfig) == nullptr, "a config that cannot be built");

  using Element =
      cute::conditional_t<kConfig.key.dtype == Dtype::kFloat16, cute::half_t, cute::bfloat16_t>;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kHeadDim = kConfig.key.head_dim;
  static constexpr int kHeadDimV = kConfig.key.head_dim_v;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kDoutStages = kConfig.dout_stages;
  static constexpr int kDsStages = kConfig.ds_stages;
  static constexpr int kCluster = cluster_blocks(kConfig);
  static constexpr bool kClustered = is_clustered(kConfig);
  static constexpr int kConsumers = kConfig.num_consumers;
  static constexpr bool kMasked = kConfig.key.mask != MaskKind::kFull;
  static constexpr bool kRagged = is_ragged(kConfig);
  static constexpr bool kCapped = kConfig.key.mask == MaskKind::kCapped;
  static constexpr bool kAheadScores = kConfig.ahead_scores;
  static constexpr bool kKeysInRegisters = kConfig.k_in_registers;
  static constexpr bool kLateDq = kConfig.late_dq;
  static constexpr bool kAlike = are_alike(kConfig);
  static constexpr bool kDsWaits = kConfig.ds_waits;
  // The producer loads its first tiles before the kernel ahead has ended, and its block has met.
  static constexpr bool kEarlyLoads = !kAlike && !kRagged;
  static constexpr bool kPersistent = is_persistent(kConfig);
  static constexpr int kTileSlots = tile_slots(kConfig);
  static constexpr int kValueBuffers = value_buffers(kConfig);
  // One V for all tiles, one after another.
  static constexpr bool kSharedValues = kValueBuffers < kTileSlots;
  static constexpr bool kThirds = in_thirds(kConfig);
  static constexpr DqSplit kDqSplit = kConfig.dq_split;
  static constexpr int kDqSlices = kConfig.dq_slices;
  static constexpr bool kDqBulk = kConfig.dq_path == DqPath::kBulk;
  static constexpr int kThreads = num_threads(kConfig);
  static constexpr int kSlab = slab_columns(kHeadDim, sizeof(Element));  // of Q
  static constexpr int kSlabK = key_slab_columns(kConfig);
  static constexpr int kSlabV = slab_columns(kHeadDimV, sizeof(Element));  // of V and dO

  using M = cute::Int<kTileM>;
  using N = cute::Int<kTileN>;
  using D = cute::Int<kHeadDim>;
  using Dv = cute::Int<kHeadDimV>;
  using Stages = cute::Int<kStages>;
  using DoutStages = cute::Int<kDoutStages>;
  using Rows = cute::Int<kConsumerRows>;
  using Consumers = cute::Int<kConsumers>;

  // Slabs of `columns`, swizzled, one after the other: what TMA's boxes write.
  template <int columns>
  using AtomK = cute::conditional_t<
      columns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
      cute::conditional_t<columns == 32, cute::GMMA::Layout_K_SW64_Atom<Element>,
                          cute::GMMA::Layout_K_SW32_Atom<Element>>>;
  template <int columns>
  using AtomMN = cute::conditional_t<
      columns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
      cute::conditional_t<columns == 32, cute::GMMA::Layout_MN_SW64_Atom<Element>,
                          cute::GMMA::Layout_MN_SW32_Atom<Element>>>;
  using LayoutQ = decltype(cute::tile_to_shape(AtomK<kSlab>{}, cute::Shape<M, D, Stages>{}));
  using LayoutDo = decltype(cute::tile_to_shape(AtomK<kSlabV>{}, cute::Shape<M, Dv, DoutStages>{}));
  using LayoutK = decltype(cute::tile_to_shape(AtomK<kSlabK>{}, cute::Shape<N, D>{}));
  using LayoutV = decltype(cute::tile_to_shape(AtomK<kSlabV>{}, cute::Shape<N, Dv>{}));
  // Of all buffers.
  using LayoutKs =
      decltype(cute::tile_to_shape(AtomK<kSlabK>{}, cute::Shape<N, D, cute::Int<kTileSlots>>{}));
  using LayoutVs = decltype(cute::tile_to_shape(AtomK<kSlabV>{},
                                                cute::Shape<N, Dv, cute::Int<kValueBuffers>>{}));
  // The same memory, read as the transpose.
  using LayoutQt = decltype(cute::tile_to_shape(AtomMN<kSlab>{}, cute::Shape<D, M, Stages>{},
                                                cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using LayoutDot = decltype(cute::tile_to_shape(AtomMN<kSlabV>{}, cute::Shape<Dv, M, DoutStages>{},
                                                 cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using LayoutKt = decltype(cute::tile_to_shape(AtomMN<kSlabK>{}, cute::Shape<D, N>{},
                                                cute::Step<cute::_2, cute::_1>{}));
  using LayoutKts =
      decltype(cute::tile_to_shape(AtomMN<kSlabK>{}, cute::Shape<D, N, cute::Int<kTileSlots>>{},
                                   cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using LayoutDs = decltype(cute::tile_to_shape(AtomK<ds_slab_columns(kTileN)>{},
                                                cute::Shape<M, N, cute::Int<kDsStages>>{}));
  using LayoutDst = decltype(cute::composition(
      LayoutDs{}, cute::make_layout(cute::Shape<N, M, cute::Int<kDsStages>>{},
                                    cute::Stride<M, cute::_1, cute::Int<kTileM * kTileN>>{})));

  // Consumer i has rows 64 i and on; each of a pair has all of them.
  using ByRows = cute::Layout<cute::Shape<Consumers, cute::_1, cute::_1>>;
  using ByKeys = cute::Layout<
      cute::Shape<cute::conditional_t<kClustered, cute::_1, Consumers>, cute::_1, cute::_1>>;
  using ByColumns = cute::Layout<cute::Shape<cute::_1, Consumers, cute::_1>>;
  // S^T and dP^T
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Rows, M, D>>(), ByKeys{}));
  using MmaScoresOfRegisters = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<Rows, M, D>>(), ByKeys{}));
  // S^T
  using MmaKeys = cute::conditional_t<kKeysInRegisters, MmaScoresOfRegisters, MmaScores>;
  using MmaDv = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<Rows, Dv, M>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      ByKeys{}));
  using MmaDk = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<Rows, D, M>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      ByKeys{}));

  // dV where it leaves through dS's buffers: a consumer's rows in the part of them that is its own,
  // a slab in each.
  static constexpr int kOwnDsElements = kTileM * kTileN / kConsumers;
  static constexpr auto make_layout_dv() {
    using namespace cute;
    if constexpr (kSharedValues) {
      static_assert(kHeadDimV / kSlabV <= kDsStages && kConsumerRows * kSlabV <= kOwnDsElements);
      constexpr auto slab = tile_to_shape(AtomK<kSlabV>{}, Shape<Rows, Int<kSlabV>>{});
      constexpr auto rows =
          make_layout(get<0>(slab.layout_b()), Layout<Consumers, Int<kOwnDsElements>>{});
      constexpr auto columns = make_layout(get<1>(slab.layout_b()),
                                           Layout<Int<kHeadDimV / kSlabV>, Int<kTileM * kTileN>>{});
      return make_composed_layout(slab.layout_a(), slab.offset(), make_layout(rows, columns));
    } else {
      return LayoutV{};
    }
  }
  using LayoutDv = decltype(make_layout_dv());

  static constexpr auto make_mma_dq() {
    using namespace cute;
    if constexpr (kDqSplit == DqSplit::kRows) {
      return make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<Rows, D, N>,
                                                 GMMA::Major::K, GMMA::Major::MN>(),
                            ByRows{});
    } else {
      using Columns = Int<kHeadDim / (kConsumers * kDqSlices)>;
      return make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<Rows, Columns, N>,
                                                 GMMA::Major::K, GMMA::Major::MN>(),
                            ByColumns{});
    }
  }
  using MmaDq = decltype(make_mma_dq());
  using ShapeDq = cute::Shape<M, cute::Int<kHeadDim / kDqSlices>>;  // a slice

  static constexpr int kQElements = kTileM * kHeadDim;
  static constexpr int kDoElements = kTileM * kHeadDimV;
  static constexpr int kDsElements = kTileM * kTileN;
  static constexpr int kDqElements = dq_elements(kConfig) / kConsumers;  // one consumer's
  static constexpr int kPeerColumns = peer_columns(kConfig);

  struct Barriers {
    FullBarrier k_full[kTileSlots];
    FullBarrier v_full[kTileSlots];
    FullBarrier q_full[kStages];
    FullBarrier dout_full[kDoutStages];
    EmptyBarrier q_empty[kStages];
    EmptyBarrier dout_empty[kDoutStages];
    EmptyBarrier ds_full[kDsStages];
    EmptyBarrier ds_empty[kDsStages];
    FullBarrier peer_ds_full[kClustered ? kDsStages : 0];
    EmptyBarrier p_full;
    EmptyBarrier p_empty;
    EmptyBarrier dq_full[kConsumers];   // a part each; in thirds all are the last consumer's
    EmptyBarrier dq_empty[kConsumers];  // or, where consumers add themselves: their turn has come
    // Of consumers alike: a tile is known; nobody needs it, its K and its V any longer; dK and dV
    // are in shared memory.
    EmptyBarrier tile_full[kAlike ? kTileSlots : 0];
    EmptyBarrier tile_empty[kAlike ? kTileSlots : 0];
    EmptyBarrier gradients_full[kAlike ? kTileSlots : 0];
    // Where tiles share V: the tile's last dP is there; dV has left shared memory.
    EmptyBarrier v_empty[kAlike ? 1 : 0];
    EmptyBarrier gradients_read[kAlike ? 1 : 0];
  };

  struct alignas(kSharedAlignment) SharedStorage {
    Element k[kTileSlots][kTileN * kHeadDim];      // dK when the tile is done
    Element v[kValueBuffers][kTileN * kHeadDimV];  // dV likewise
    Element q[kStages][kQElements];
    Element dout[kDoutStages][kDoElements];
    Element ds[kDsStages][kDsElements];
    Element p16[in_thirds(kConfig) ? kDsStages : 0][kDsElements];  // P, as ds
    Element peer_k[kTileN * kPeerColumns];  // of a cluster's other block, as its dS
    Element peer_ds[kClustered ? kDsStages : 0][kDsElements];
    float dq[dq_bytes(kConfig) / sizeof(float)];  // a consumer's after the other
    float p[p_bytes(kConfig) / sizeof(float)];
    float lse_log2[kStages][kTileM];
    float delta[delta_stages(kConfig)][kTileM];
    SharedTile tile[kRagged || kAlike ? kTileSlots : 0];
    Barriers barriers;
  };
  static_assert(!kRagged || sizeof(SharedTile) * kTileSlots == tile_bytes(kConfig),
                "16-byte loads");
  static_assert(sizeof(SharedStorage) == shared_bytes(kConfig), "budget counts every byte");
};

}  // namespace hopper_attention
