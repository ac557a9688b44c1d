// From a consumer's registers to global memory: O through shared memory and TMA, LSE directly.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/stmatrix.cuh"
#include "forward/mma.cuh"

namespace hopper_attention {

// The logit that joins the softmax of each row of a head; -inf where there is none.
CUTE_DEVICE float read_sink(ForwardParams const& params, int head) {
  return params.sink == nullptr ? -INFINITY : __ldg(params.sink + head);
}

// Where chunk `chunk` (16 bytes) of a row of O lies within a slab of LayoutO: in bytes.
template <class Traits>
CUTE_HOST_DEVICE constexpr unsigned staged_offset(unsigned row, unsigned chunk) {
  constexpr unsigned kRowBytes = Traits::kSlabV * sizeof(typename Traits::Element);
  const unsigned offset = row * kRowBytes + chunk * 16;
  return offset ^ (offset >> 3 & (kRowBytes - 16));  // TMA's swizzle
}

template <class Traits>
constexpr bool staged_offset_is_right() {
  constexpr unsigned kBytes = sizeof(typename Traits::Element), kSlab = Traits::kSlabV;
  constexpr typename Traits::LayoutO kLayout{};  // its swizzle is of addresses, in bytes
  for (unsigned row = 0; row < kConsumerRows; ++row) {
    for (unsigned column = 0; column < Traits::kHeadDimV; column += 16 / kBytes) {
      const unsigned place = cute::get_swizzle_portion(kLayout)(
          cute::get_nonswizzle_portion(kLayout)(row, column) * kBytes);
      const unsigned slab = column / kSlab * kConsumerRows * kSlab * kBytes;
      const unsigned chunk = column % kSlab * kBytes / 16;
      if (slab + staged_offset<Traits>(row, chunk) != place) return false;
    }
  }
  return true;
}

// As a copy of CuTe's by stmatrix to LayoutO, with 32-bit addresses that are made of one: it would
// compute 64-bit ones, and each of them anew where thread is not kept through the loop.
template <class Traits, class Fragment>
CUTE_DEVICE void write_fragment(typename Traits::SharedStorage& shared, Fragment const& rO16,
                                int consumer, unsigned thread) {
  static_assert(staged_offset_is_right<Traits>());
  constexpr unsigned kSlab = Traits::kSlabV, kBytes = sizeof(typename Traits::Element);
  const unsigned at = cute::cast_smem_ptr_to_uint(shared.o(consumer)) +
                      staged_offset<Traits>(thread / 32 * 16 + thread % 16, thread % 32 / 16);
  const auto* pairs = reinterpret_cast<const std::uint32_t*>(rO16.data());
  CUTE_UNROLL
  for (unsigned column = 0; column < Traits::kHeadDimV; column += 16) {
    const unsigned slab = column / kSlab * kConsumerRows * kSlab * kBytes;
    // Within a slab the swizzle is an exclusive or, as the next columns' address is.
    store_matrices((at ^ (column % kSlab * kBytes)) + slab, pairs + column / 4);
  }
}

// Brings O into this consumer's buffer in shared memory, rounded once.
template <class Traits, class Output>
CUTE_DEVICE void stage_output(typename Traits::SharedStorage& shared, Output const& rO,
                              int consumer, int thread) {
  using namespace cute;
  using Element = typename Traits::Element;
  constexpr int kSize = decltype(size(rO))::value;
  Tensor rO16 = make_tensor<Element>(rO.layout());
  cutlass::NumericArrayConverter<Element, float, kSize> convert;
  *reinterpret_cast<cutlass::Array<Element, kSize>*>(rO16.data()) =
      convert(*reinterpret_cast<const cutlass::Array<float, kSize>*>(rO.data()));

  if constexpr (Traits::kOOnV) {
    // Every consumer's last product with V is done, and no V of the next tile is on its way yet.
    sync_named(NamedBarrier::kTileEnd, 0, Traits::kConsumers * kWarpgroupThreads);
  } else {
    if (thread == 0) tma_store_wait<0>();  // the last tile's O has left the buffer
    sync_named(NamedBarrier::kEpilogue, consumer, kWarpgroupThreads);
  }
  if constexpr (Traits::kPacked) {
    write_fragment<Traits>(shared, rO16, consumer, thread);
  } else {
    Tensor sO = make_tensor(make_smem_ptr(shared.o(consumer)), typename Traits::LayoutO{});
    auto copy_o =
        make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaPV{});
    auto thread_copy = copy_o.get_thread_slice(thread);
    copy(copy_o, thread_copy.retile_S(rO16), thread_copy.partition_D(sO));
  }
  tma_store_fence();  // what TMA reads was written by ordinary stores
  sync_named(NamedBarrier::kEpilogue, consumer, kWarpgroupThreads);
}

// What one thread does once O is staged; row: of the tensor.
template <class Traits>
CUTE_DEVICE void send_output(ForwardParams const& params, typename Traits::SharedStorage& shared,
                             int row, int head, int batch, int consumer) {
  using namespace cute;
  auto* buffer = shared.o(consumer);
  CUTE_UNROLL
  for (int column = 0; column < Traits::kHeadDimV; column += Traits::kSlabV) {
    SM90_TMA_STORE_4D::copy(&params.out, buffer + column * kConsumerRows, column, row, head, batch);
  }
  tma_store_arrive();
  if constexpr (Traits::kOOnV) {
    tma_store_wait<0>();  // read, not yet written: V may come
    shared.barriers.o_sent[consumer].arrive();
  }
}

CUTE_DEVICE void store_lse(ForwardParams const& params, float const (&lse)[kRowsPerThread],
                           WorkTile tile, int first_row, int thread) {
  if (params.lse == nullptr || thread % 4 != 0) return;
  const int seqlen_q = params.mask.seqlen_q;
  const int row = fragment_first_row(thread, first_row);
  float* head = params.lse +
                (static_cast<std::int64_t>(tile.batch) * params.order.heads + tile.head) * seqlen_q;
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    if (row + 8 * r < seqlen_q) head[row + 8 * r] = lse[r];
  }
}

}  // namespace hopper_attention
