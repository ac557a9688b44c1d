// Consumers that share a block of more than 64 keys, for head dimensions whose dK and dV do not fit
// one consumer's registers together. Each computes S, P, dP and dS of all queries and half of the
// keys, and half of dQ; the first dV^T = dO^T P, the second dK^T = Q^T dS, of all keys.
//
// Queries are the rows of S and dP here, and columns of dO and Q those of the gradients: so the
// keys of a block need not be 64 for each consumer. P and dS pass through shared memory in 16 bits,
// two buffers of each. That is all that the two have to wait for: a warp that has seen all of a
// step's dS knows that both are done with the step before, and its buffers are free.
#pragma once

#include "backward/mma.cuh"
#include "backward/paired_mma.cuh"

namespace hopper_attention {

template <class Traits>
struct HalvesTraits {
  using Element = typename Traits::Element;
  using M = typename Traits::M;
  using N = typename Traits::N;
  using Rows = typename Traits::Rows;
  using Stages = cute::Int<Traits::kDsStages>;
  static constexpr int kHalf = Traits::kTileN / 2;  // keys
  static constexpr int kSlabP = ds_slab_columns(Traits::kTileN);

  // S and dP, (queries x keys)
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<Rows, cute::Int<kHalf>, typename Traits::D>>(),
      typename Traits::ByColumns{}));
  using ShapeScores = cute::Shape<M, N>;
  // dV^T and dK^T, (columns x keys)
  using MmaGradient = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Rows, N, M>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));

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

// kValues: dV^T, else dK^T.
template <class Traits, bool kValues>
CUTE_DEVICE auto make_half_gradient() {
  constexpr int kColumns = kValues ? Traits::kHeadDimV : Traits::kHeadDim;
  using Mma = typename HalvesTraits<Traits>::MmaGradient;
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
template <class Scores>
CUTE_DEVICE void exponentiate_rows(float scale_log2, RowPair const& lse_log2, Scores& s) {
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(s))::value; ++i) {
    s(i) = exp2f(fmaf(s(i), scale_log2, -lse_log2.of[fragment_row(i)]));
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

// dS = P * (dP - delta) in 16 bits.
template <class Scores, class Operand>
CUTE_DEVICE void round_ds_rows(RowPair const& delta, Scores const& p, Scores const& dp,
                               Operand& ds16) {
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(p))::value; i += 2) {
    const float row_delta = delta.of[fragment_row(i)];
    round_pair(ds16, i, ds_of(p(i), dp(i), row_delta), ds_of(p(i + 1), dp(i + 1), row_delta));
  }
}

// A consumer's half of P or dS into a buffer of both: a warp has 16 rows, and stores 16 columns of
// them at a time.
template <class Traits, int kConsumer, class Element, class Operand>
CUTE_DEVICE void write_half(Element* buffer, int stage, int thread, Operand const& operand) {
  using namespace cute;
  constexpr int kHalf = HalvesTraits<Traits>::kHalf;
  Tensor to = make_tensor(make_smem_ptr(buffer), typename Traits::LayoutDs{});
  const int row = thread / 32 * 16 + thread % 16;
  const int column = kConsumer * kHalf + thread % 32 / 16 * 8;
  auto const* words = reinterpret_cast<std::uint32_t const*>(operand.data());
  CUTE_UNROLL
  for (int i = 0; i < kHalf / 16; ++i) {
    auto& first = *reinterpret_cast<uint128_t*>(&to(row, column + 16 * i, stage));
    SM90_U32x4_STSM_N::copy(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3],
                            first);
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
template <class Traits, int kConsumer, class LayoutA, class LayoutB, class Element, class Scores>
CUTE_DEVICE void issue_half_scores(Element* a, Element* b, int stage, Scores& scores) {
  using namespace cute;
  typename HalvesTraits<Traits>::MmaScores mma;
  auto slice = mma.get_thread_slice(kConsumer * kWarpgroupThreads);
  Tensor rA = slice.partition_fragment_A(make_tensor(make_smem_ptr(anew(a)), LayoutA{}));
  Tensor rB = slice.partition_fragment_B(make_tensor(make_smem_ptr(anew(b)), LayoutB{}));
  Tensor now = rA(_, _, _, stage);
  issue_product<true>(mma, now, rB, scores);
}

// Issues dV^T += dO^T P or dK^T += Q^T dS.
template <class Traits, bool kValues, class Gradient>
CUTE_DEVICE void issue_half_gradient(typename Traits::SharedStorage& shared, int stage, bool fresh,
                                     Gradient& gradient) {
  using namespace cute;
  using Half = HalvesTraits<Traits>;
  using LayoutA =
      cute::conditional_t<kValues, typename Traits::LayoutDot, typename Traits::LayoutQt>;
  typename Half::MmaGradient mma;
  auto slice = mma.get_thread_slice(0);
  auto* const a = anew(kValues ? shared.dout[0] : shared.q[0]);
  auto* const b = anew(kValues ? shared.p16[0] : shared.ds[0]);
  Tensor rA = slice.partition_fragment_A(make_tensor(make_smem_ptr(a), LayoutA{}));
  Tensor rB = slice.partition_fragment_B(make_tensor(make_smem_ptr(b), typename Half::LayoutPt{}));
  warpgroup_fence_operand(gradient);
  warpgroup_arrive();
  mma.accumulate_ = fresh ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int k = 0; k < Traits::kTileM / 16; ++k) {
    gemm(mma, rA(_, _, k, stage), rB(_, _, k, stage), gradient);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(gradient);
}

// The first consumer if kValues, else the second.
//
// A step ends with dQ's product. Its adds come in the next step, under the gradient's product.
template <class Traits, bool kValues, class Gradient>
CUTE_DEVICE void accumulate_half(BackwardParams const& params, KeyTile const& tile,
                                 typename Traits::SharedStorage& shared, int thread,
                                 Gradient& gradient) {
  using namespace cute;
  using Element = typename Traits::Element;
  using Half = HalvesTraits<Traits>;
  using Step = StepCount<Traits::kStages>;
  static_assert(Traits::kStages == Traits::kDsStages, "one counter for both");
  constexpr int kConsumer = kValues ? 0 : 1;
  auto& barriers = shared.barriers;
  auto adder = make_dq_adder<Traits>(params, shared, kConsumer, thread);

  const int row = thread / 32 * 16 + thread % 32 / 4;
  const int first_key = tile.n_block * Traits::kTileN + kConsumer * Half::kHalf + thread % 4 * 2;
  const BlockRange plain = plain_steps<Traits>(tile_mask<Traits>(params, shared), tile);
  Tensor rS = partition_fragment_C(typename Half::MmaScores{}, typename Half::ShapeScores{});
  Tensor rdQ = partition_fragment_C(typename Traits::MmaDq{}, typename Traits::ShapeDq{});
  std::int64_t late_block = 0;  // of the step before, as is rdQ
  Step at_step;
  QuerySteps at = query_steps(params, tile);
  if (!at.done()) {
    barriers.k_full.wait(0);
    barriers.v_full.wait(0);
  }
  // The gradient of the step before is done.
  auto release = [&] {
    const Step last{at_step.count - 1};
    warpgroup_fence_operand(gradient);
    if (at_step.count > 0) {
      arrive_warp(kValues ? barriers.dout_empty[last.stage()] : barriers.q_empty[last.stage()]);
    }
  };
  // What is left of the step before: its gradient, and dQ's adds. The first step has none before
  // it: its product is of what lies in the buffers, and the next one begins anew. A branch around
  // the product would make ptxas set registers aside anew in every step (C7519).
  auto finish = [&](auto kPlain) __attribute__((always_inline)) {
    const Step last{at_step.count - 1};
    issue_half_gradient<Traits, kValues>(shared, last.stage(), at_step.count < 2, gradient);
    if constexpr (!kPlain) {  // else ptxas puts a wait into the masked step (C7517)
      warpgroup_wait<0>();
      release();
    }
    if (at_step.count > 0) {
      adder.begin();
      adder.add(rdQ, late_block, 0);
      adder.end();
    }
  };
  auto step = [&](auto kPlain) __attribute__((always_inline)) {
    const int stage = at_step.stage();
    const std::uint32_t phase = at_step.phase();
    finish(kPlain);
    barriers.q_full[stage].wait(phase);
    issue_half_scores<Traits, kConsumer, typename Traits::LayoutQ, typename Traits::LayoutK>(
        shared.q[0], shared.k, stage, rS);
    Tensor rdP = partition_fragment_C(typename Half::MmaScores{}, typename Half::ShapeScores{});
    barriers.dout_full[stage].wait(phase);
    issue_half_scores<Traits, kConsumer, typename Traits::LayoutDo, typename Traits::LayoutV>(
        shared.dout[0], shared.v, stage, rdP);
    warpgroup_wait<1>();
    if constexpr (kPlain) release();
    warpgroup_fence_operand(rS);
    exponentiate_rows(params.scale_log2, row_pair(shared.lse_log2[stage], row), rS);
    if constexpr (kValues) arrive_warp(barriers.q_empty[stage]);
    if constexpr (!kPlain) {
      const int first_row = at.m_block * Traits::kTileM + row;
      mask_rows<Traits>(tile_mask<Traits>(params, shared), first_row, first_key, rS);
    }
    Tensor rounded = make_tensor<Element>(rS.layout());
    convert_fragment<Element>(rS, rounded);
    write_half<Traits, kConsumer>(shared.p16[0], stage, thread, rounded);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdP);
    round_ds_rows(row_pair(shared.delta[stage], row), rS, rdP, rounded);
    write_half<Traits, kConsumer>(shared.ds[0], stage, thread, rounded);
    __syncwarp();
    arrive_warp(barriers.ds_full[stage]);
    if constexpr (!kValues) arrive_warp(barriers.dout_empty[stage]);
    barriers.ds_full[stage].wait(phase);
    issue_dq<Traits>(dq_operands<Traits>(*anew(&shared), kConsumer * kWarpgroupThreads), stage, 0,
                     rdQ);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdQ);
    late_block = at.block;
    ++at_step.count;
  };
  start_gradients(gradient);
  for_each_step<Traits>(at, plain, step);
  if (at_step.count > 0) finish(false_type{});
}

}  // namespace hopper_attention
