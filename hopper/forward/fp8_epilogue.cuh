// From an e4m3 consumer's registers to global memory: O divided by the row sums and scaled by V's
// channels, in 16 bits, through shared memory and TMA.
#pragma once

#include "forward/epilogue.cuh"
#include "forward/fp8_mma.cuh"

namespace hopper_attention {

// Divides O by the row sums, the head's sink included, multiplies it by V's scales and returns each
// row's log-sum-exp.
template <class Traits, class Output>
CUTE_DEVICE void finish_fp8(ForwardParams const& params, typename Traits::SharedStorage& shared,
                            Fp8Softmax<Traits>& softmax, Output& rO, TileMessage const& message,
                            int consumer, int thread, float (&lse)[kRowsPerThread]) {
  const ScaleParams& scales = params.scales;
  constexpr int kSize = Traits::kHeadDimV / 2;
  float total[kRowsPerThread], factor[kRowsPerThread];
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    if constexpr (Traits::kSumsInO) {
      total[r] = rO(kSize + 2 * r);  // each of the ones' columns has it
    } else if constexpr (Traits::kOnes) {
      total[r] = softmax.sum[r];
    } else {
      total[r] = quad_reduce(softmax.sum[r], [](float a, float b) { return a + b; });
    }
    if constexpr (Traits::kTokenSums) {
      if (scales.v_token_factor != nullptr) {
        total[r] = shared.row_sums[consumer][row_in_consumer(thread, r)];
      }
    }
  }
  // As read_sink, but of a -inf that the compiler knows nothing of: it would be kept from the
  // tile's beginning on, at d256 in local memory.
  const float sink =
      params.sink == nullptr ? opaque(-INFINITY) : load_scale(params.sink + message.tile.head);
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    factor[r] = finish_row(total[r], softmax.shift[r], sink, lse[r]);  // both hold kOffsetLog2
  }
  const float* channels = scales.v == nullptr
                              ? nullptr
                              : scales.v + message.tile.batch * scales.v_stride_batch +
                                    message.head_kv * scales.v_stride_head;
  if (channels != nullptr && scales.v_stride_channel == 0) {
    const float v = __ldg(channels);
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) factor[r] *= v;
  }
  CUTE_UNROLL
  for (int i = 0; i < kSize; ++i) rO(i) *= factor[fragment_row(i)];
  if (channels == nullptr || scales.v_stride_channel == 0) return;
  CUTE_UNROLL
  for (int j = 0; j < kSize / kRowsPerThread; ++j) {
    const int channel = thread % 4 * 2 + fragment_column(fragment_index(0, j));
    const float scale = channel < params.head_dim_v ? __ldg(channels + channel) : 0.0f;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) rO(fragment_index(r, j)) *= scale;
  }
}

template <class Element>
CUTE_DEVICE std::uint32_t pack(float low, float high) {
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  const cutlass::Array<Element, 2> pair = convert({low, high});
  return reinterpret_cast<std::uint32_t const&>(pair);
}

// A round of O, from its register `first` on, in 16 bits, to the swizzled slabs that TMA reads. The
// addresses are made by hand: a slab's differ from the next one's by a constant, which CuTe's
// swizzled pointers do not show, and 16 of them would be spilled at d256.
template <class Traits, class Element, class Output>
CUTE_DEVICE void stage_round(Output const& rO, int first, cute::half_t* buffer, int thread) {
  constexpr int kSlab = Traits::kSlabO;
  constexpr int kChunks = kSlab / 8;  // of 16 bytes in a row of a slab
  const int lane = thread % 32, matrix = lane / 8;
  const int row = thread / 32 * 16 + matrix % 2 * 8 + lane % 8;
  const int swizzle = row / (8 / kChunks) % kChunks;
  CUTE_UNROLL
  for (int pair = 0; pair < kChunks / 2; ++pair) {  // 16 columns of every slab
    const int chunk = (2 * pair + matrix / 2) ^ swizzle;
    cute::half_t* address = buffer + row * kSlab + chunk * 8;
    CUTE_UNROLL
    for (int slab = 0; slab < Traits::kRoundColumns / kSlab; ++slab) {
      std::uint32_t registers[4];  // rows 0 to 7 and 8 to 15 of 8 columns, then of the next 8
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int element = first + (slab * kSlab + 16 * pair) / 2 + 2 * i;
        registers[i] = pack<Element>(rO(element), rO(element + 1));
      }
      store_matrices(cute::cast_smem_ptr_to_uint(address + slab * kSlab * kConsumerRows),
                     registers);
    }
  }
}

template <class Traits, class Output>
CUTE_DEVICE void store_fp8_output(ForwardParams const& params,
                                  typename Traits::SharedStorage& shared, Output const& rO,
                                  WorkTile tile, int first_row, int consumer, int thread) {
  using namespace cute;
  const bool leader = thread == 0;
  const bool on_q = Traits::o_on_q(params.v_transposed);
  half_t* buffer = shared.o(consumer, params.v_transposed);
  for_each(make_int_sequence<Traits::kORounds>{}, [&](auto round) {
    // The buffer is free when the last round's O has left it (and, where O lies on Q, when every
    // warp has multiplied with Q for the last time).
    if (on_q || decltype(round)::value == 0) {
      if (leader) tma_store_wait<0>();
      sync_named(NamedBarrier::kEpilogue, consumer, kWarpgroupThreads);
    } else {
      buffer += Traits::kRoundElements;  // there is room for all rounds
    }
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
  if (on_q) {
    if (!leader) return;
    tma_store_wait<0>();  // read, not yet written: Q may come
    shared.barriers.q_empty[consumer].arrive();
  }
}

}  // namespace hopper_attention
