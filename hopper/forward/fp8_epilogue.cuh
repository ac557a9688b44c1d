// From an e4m3 consumer's registers to global memory: O divided by the row sums and scaled by V's
// channels, in 16 bits, through shared memory and TMA.
#pragma once

#include "forward/epilogue.cuh"
#include "forward/fp8_mma.cuh"

namespace hopper_attention {

// Divides O by the row sums, multiplies it by V's scales and returns each row's log-sum-exp; a row
// without keys gets 0 and -inf.
template <class Traits, class Output>
CUTE_DEVICE void finish_fp8(ForwardParams const& params, Fp8Softmax<Traits>& softmax, Output& rO,
                            WorkTile tile, int thread, float (&lse)[kRowsPerThread]) {
  const ScaleParams& scales = params.scales;
  constexpr int kSize = Traits::kHeadDimV / 2;
  float factor[kRowsPerThread];
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    float total;
    if constexpr (Traits::kOnes) total = rO(kSize + 2 * r);  // each of the ones' columns has it
    if (!Traits::kOnes || scales.v_token_factor != nullptr) {
      total = quad_reduce(softmax.sum[r], [](float a, float b) { return a + b; });
    }
    factor[r] = total == 0.0f ? 0.0f : 1.0f / total;
    lse[r] = softmax.log_sum_exp(total, r);
  }
  if (scales.v != nullptr && scales.v_stride_channel == 0) {
    const float v = __ldg(scales.v + tile.batch * scales.v_stride_batch +
                          tile.head / params.heads_per_kv * scales.v_stride_head);
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) factor[r] *= v;
  }
  CUTE_UNROLL
  for (int i = 0; i < kSize; ++i) rO(i) *= factor[fragment_row(i)];
  if (scales.v == nullptr || scales.v_stride_channel == 0) return;
  const float* channels = scales.v + tile.batch * scales.v_stride_batch +
                          tile.head / params.heads_per_kv * scales.v_stride_head;
  CUTE_UNROLL
  for (int j = 0; j < kSize / kRowsPerThread; ++j) {
    const int channel = thread % 4 * 2 + fragment_column(fragment_index(0, j));
    const float scale = channel < params.head_dim_v ? __ldg(channels + channel) : 0.0f;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) rO(fragment_index(r, j)) *= scale;
  }
}

// Registers first to first + 31 (and so on) of O, in 16 bits, to a swizzled buffer.
template <class Traits, class Element, class Output>
CUTE_DEVICE void stage_round(Output const& rO, int first, cute::half_t* buffer, int thread) {
  using namespace cute;
  using Round = Shape<typename Traits::M, Int<Traits::kRoundColumns>>;
  Tensor r16 = make_tensor<Element>(partition_shape_C(typename Traits::MmaO{}, Round{}));
  constexpr int kSize = decltype(size(r16))::value;
  CUTE_UNROLL
  for (int i = 0; i < kSize; ++i) r16(i) = static_cast<Element>(rO(first + i));
  Tensor sO = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(buffer)),
                          typename Traits::LayoutO{});
  auto copy_o = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaO{});
  auto thread_copy = copy_o.get_thread_slice(thread);
  copy(copy_o, thread_copy.retile_S(r16), thread_copy.partition_D(sO));
}

template <class Traits, class Output>
CUTE_DEVICE void store_fp8_output(ForwardParams const& params,
                                  typename Traits::SharedStorage& shared, Output const& rO,
                                  WorkTile tile, int first_row, int consumer, int thread) {
  using namespace cute;
  const bool leader = thread == 0;
  half_t* buffer = shared.o(consumer);
  for_each(make_int_sequence<Traits::kORounds>{}, [&](auto round) {
    // The buffer is free when the last round's O has left it (and, where O lies on Q, when every
    // warp has multiplied with Q for the last time).
    if (leader) tma_store_wait<0>();
    sync_named(NamedBarrier::kEpilogue, consumer, kWarpgroupThreads);
    constexpr int kFirst = decltype(round)::value * Traits::kRoundColumns / 2;
    if (params.out_float16) {
      stage_round<Traits, half_t>(rO, kFirst, buffer, thread);
    } else {
      stage_round<Traits, bfloat16_t>(rO, kFirst, buffer, thread);
    }
    tma_store_fence();  // what TMA reads was written by ordinary stores
    sync_named(NamedBarrier::kEpilogue, consumer, kWarpgroupThreads);
    if (!leader) return;
    CUTE_UNROLL
    for (int column = 0; column < Traits::kRoundColumns; column += Traits::kSlabO) {
      SM90_TMA_STORE_4D::copy(&params.out, buffer + column * kConsumerRows,
                              decltype(round)::value * Traits::kRoundColumns + column, first_row,
                              tile.head, tile.batch);
    }
    tma_store_arrive();
  });
  if constexpr (Traits::kOverlayO) {
    if (!leader) return;
    tma_store_wait<0>();  // read, not yet written: Q may come
    shared.barriers.q_empty[consumer].arrive();
  }
}

}  // namespace hopper_attention
