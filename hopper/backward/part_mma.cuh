// What consumers that share a block's keys compute and multiply: S, P, dP and dS of all queries and
// a part of the keys, and parts of the gradients.
//
// Queries are the rows of S and dP here, and columns of dO and Q those of the gradients, which are
// computed transposed: so the keys of a block need not be 64 for each consumer. P and dS pass
// through shared memory in 16 bits.
#pragma once

#include "backward/mma.cuh"
#include "backward/paired_mma.cuh"
#include "common/stmatrix.cuh"

namespace hopper_attention {

template <class Traits>
struct PartTraits {
  using Element = typename Traits::Element;
  using M = typename Traits::M;
  using N = typename Traits::N;
  using Rows = typename Traits::Rows;
  using Stages = cute::Int<Traits::kDsStages>;
  static constexpr int kKeys = Traits::kTileN / kScorers;  // of a consumer's scores
  static constexpr int kSlabP = ds_slab_columns(Traits::kTileN);

  // S and dP, (queries x keys)
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<Rows, cute::Int<kKeys>, typename Traits::D>>(),
      cute::Layout<cute::Shape<cute::_1, cute::Int<kScorers>, cute::_1>>{}));
  using ShapeScores = cute::Shape<M, N>;
  // dV^T and dK^T, (columns x keys): those of kParts consumers, each with as many columns.
  template <int kParts>
  using MmaColumns = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Rows, N, M>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>(),
      cute::Layout<cute::Shape<cute::Int<kParts>, cute::_1, cute::_1>>{}));
  template <bool kValues>
  using MmaGradient =
      MmaColumns<gradient_parts(Traits::kConfig, kValues ? Traits::kHeadDimV : Traits::kHeadDim)>;

  // P's and dS's memory, LayoutDs, read as the transpose.
  using LayoutPt = decltype(cute::tile_to_shape(typename Traits::template AtomMN<kSlabP>{},
                                                cute::Shape<N, M, Stages>{},
                                                cute::Step<cute::_2, cute::_1, cute::_3>{}));
  // K's and V's memory, in which the gradients leave.
  using LayoutDkt = typename Traits::LayoutKt;
  using LayoutDvt = decltype(cute::tile_to_shape(typename Traits::template AtomMN<Traits::kSlabV>{},
                                                 cute::Shape<typename Traits::Dv, N>{},
                                                 cute::Step<cute::_2, cute::_1>{}));
};

// A consumer's columns of dV^T if kValues, else of dK^T.
template <class Traits, bool kValues>
CUTE_DEVICE auto make_part_gradient() {
  constexpr int kColumns = kValues ? Traits::kHeadDimV : Traits::kHeadDim;
  using Mma = typename PartTraits<Traits>::template MmaGradient<kValues>;
  using Shape = cute::Shape<cute::Int<kColumns>, typename Traits::N>;
  return cute::partition_fragment_C(Mma{}, Shape{});
}

// A thread's two rows of a statistic.
struct RowPair {
  float of[kRowsPerThread];
};
CUTE_DEVICE RowPair row_pair(float const* statistic, int row) {
  return {{statistic[row], statistic[row + 8]}};
}

// S -> P = exp2(scale_log2 * S - LSE_log2), in place.
template <class Traits, class Scores>
CUTE_DEVICE void exponentiate_rows(BackwardParams const& params, RowPair const& lse_log2,
                                   Scores& s) {
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(s))::value; ++i) {
    const float lse = lse_log2.of[fragment_row(i)];
    if constexpr (Traits::kCapped) {
      s(i) = exp2f(fmaf(precise_tanh(s(i) * params.inner_scale), params.cap_log2, -lse));
    } else {
      s(i) = exp2f(fmaf(s(i), params.scale_log2, -lse));
    }
  }
}

// P where a key is not seen. row: this thread's first; first_key: its first column's.
template <class Traits, class Scores>
CUTE_DEVICE void mask_rows(Mask const& mask, int row, int first_key, Scores& p) {
  constexpr bool kTailOnly = !Traits::kMasked;
  int begin[kRowsPerThread], end[kRowsPerThread];
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    begin[r] = kTailOnly ? 0 : mask.first_key(row + 8 * r) - first_key;
    end[r] = (kTailOnly ? mask.seqlen_k : mask.end_key(row + 8 * r)) - first_key;
  }
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(p))::value; ++i) {
    const int r = fragment_row(i), column = fragment_column(i);
    if (column >= end[r] || (!kTailOnly && column < begin[r])) p(i) = 0.0f;
  }
}

// dS = P * (dP - delta) of an element. lse_log2: for soft caps.
template <class Traits, class Scores>
CUTE_DEVICE float ds_of_rows(BackwardParams const& params, RowPair const& delta,
                             RowPair const& lse_log2, Scores const& p, Scores const& dp, int i) {
  const int row = fragment_row(i);
  if constexpr (Traits::kCapped) {
    return capped_ds_of(params, p(i), dp(i), delta.of[row], lse_log2.of[row]);
  } else {
    return ds_of(p(i), dp(i), delta.of[row]);
  }
}

// Where a thread begins to store its part of P or dS: bytes from a buffer's begin, but for its
// consumer's first column. A warp has 16 rows, and stores 16 columns of them at a time.
template <class Traits>
CUTE_DEVICE std::uint32_t part_offset(int thread) {
  const int row = thread / 32 * 16 + thread % 16, column = thread % 32 / 16 * 8;
  // The swizzle is one of bytes: called on its own, the layout would swizzle elements.
  typename Traits::LayoutDs layout;
  return layout.layout_a()(layout.layout_b()(row, column, 0) * kElementBytes);
}

// A consumer's part of P or dS in 16 bits into a buffer of all. value_of(i): an element of the
// thread's fragment; offset: part_offset.
template <class Traits, class Element, class ValueOf>
CUTE_DEVICE void write_part(Element* buffer, int consumer, std::uint32_t offset, ValueOf value_of) {
  using namespace cute;
  constexpr int kPieces = PartTraits<Traits>::kKeys / 16;
  // Pieces of 16 columns: two in a slab, of 64 bytes a row, in which the swizzle is an exclusive
  // or.
  static_assert(PartTraits<Traits>::kSlabP == 32);
  constexpr int kSlabBytes = Traits::kTileM * 32 * kElementBytes;
  CUTE_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    Tensor rounded = make_tensor<Element>(Int<8>{});
    CUTE_UNROLL
    for (int j = 0; j < 8; j += 2) {
      round_pair(rounded, j, value_of(8 * i + j), value_of(8 * i + j + 1));
    }
    auto const* words = reinterpret_cast<std::uint32_t const*>(rounded.data());
    const int piece = consumer * kPieces + i;
    const std::uint32_t address =
        cast_smem_ptr_to_uint(buffer) + piece / 2 * kSlabBytes + (offset ^ (piece % 2 * 32u));
    store_matrices(address, words);
  }
  tma_store_fence();  // the tensor cores read what ordinary stores wrote
}

// The same address, which the compiler takes for another one. Descriptors are then made anew in
// each step: kept from step to step, they take more registers than there are.
template <class Element>
CUTE_DEVICE Element* anew(Element* address) {
  asm volatile("" : "+l"(address));
  return address;
}

// Issues S = Q K^T or dP = dO V^T for a consumer's keys.
template <class Traits, class LayoutA, class LayoutB, class Element, class Scores>
CUTE_DEVICE void issue_part_scores(Element* a, Element* b, int stage, int consumer,
                                   Scores& scores) {
  using namespace cute;
  typename PartTraits<Traits>::MmaScores mma;
  auto slice = mma.get_thread_slice(consumer * kWarpgroupThreads);
  Tensor rA = slice.partition_fragment_A(make_tensor(make_smem_ptr(anew(a)), LayoutA{}));
  Tensor rB = slice.partition_fragment_B(make_tensor(make_smem_ptr(anew(b)), LayoutB{}));
  Tensor now = rA(_, _, _, stage);
  issue_product<true>(mma, now, rB, scores);
}

// Issues dV^T += dO^T P or dK^T += Q^T dS. part: which columns; stage: of dO or Q; ds_stage: of P
// or dS.
template <class Traits, bool kValues, class Gradient>
CUTE_DEVICE void issue_part_gradient(typename Traits::SharedStorage& shared, int part, int stage,
                                     int ds_stage, bool fresh, Gradient& gradient) {
  using namespace cute;
  using Part = PartTraits<Traits>;
  using LayoutA =
      cute::conditional_t<kValues, typename Traits::LayoutDot, typename Traits::LayoutQt>;
  typename Part::template MmaGradient<kValues> mma;
  auto slice = mma.get_thread_slice(part * kWarpgroupThreads);
  auto* const a = anew(kValues ? shared.dout[0] : shared.q[0]);
  auto* const b = anew(kValues ? shared.p16[0] : shared.ds[0]);
  Tensor rA = slice.partition_fragment_A(make_tensor(make_smem_ptr(a), LayoutA{}));
  Tensor rB = slice.partition_fragment_B(make_tensor(make_smem_ptr(b), typename Part::LayoutPt{}));
  warpgroup_fence_operand(gradient);
  warpgroup_arrive();
  mma.accumulate_ = fresh ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int k = 0; k < Traits::kTileM / 16; ++k) {
    gemm(mma, rA(_, _, k, stage), rB(_, _, k, ds_stage), gradient);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(gradient);
}

}  // namespace hopper_attention
