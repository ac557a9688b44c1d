// The epilogue's part that is packed batches' own: no row of the next sequence is touched.
#pragma once

#include "forward/epilogue.cuh"

namespace hopper_attention {

// Rows that a sequence has and does not use give 0 and -inf, whatever Q holds there.
template <class Output>
CUTE_DEVICE void clear_unused_rows(Softmax& softmax, Output& rO, int seqlen_q, int first_row,
                                   int thread) {
  if (first_row + kConsumerRows <= seqlen_q) return;
  const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    if (row + 8 * r >= seqlen_q) softmax.sum[r] = 0.0f;
  }
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(rO))::value; ++i) {
    if (row + 8 * fragment_row(i) >= seqlen_q) rO(i) = 0.0f;
  }
}

// The first num_rows rows of O from shared memory, to row `row` of the tensor.
template <class Traits>
CUTE_DEVICE void copy_output_rows(ForwardParams const& params,
                                  typename Traits::SharedStorage& shared, int row, int num_rows,
                                  int head, int consumer, int thread) {
  using namespace cute;
  using Element = typename Traits::Element;
  constexpr int kColumns = sizeof(uint4) / sizeof(Element);  // at a time
  constexpr int kChunks = Traits::kHeadDimV / kColumns;
  const PackedParams& packed = params.packed;
  Tensor sO = make_tensor(make_smem_ptr(shared.o(consumer)), typename Traits::LayoutO{});
  auto* out = static_cast<Element*>(packed.out) + head * packed.out_stride_head;
  CUTE_NO_UNROLL
  for (int i = thread; i < num_rows * kChunks; i += kWarpgroupThreads) {
    const int from = i / kChunks, column = i % kChunks * kColumns;
    if (column >= params.head_dim_v) continue;
    *reinterpret_cast<uint4*>(out + (row + from) * packed.out_stride_row + column) =
        *reinterpret_cast<const uint4*>(&sO(from, column));
  }
}

// Stores a consumer's rows of a tile, once O is staged: by TMA where all of them are the
// sequence's, else row by row.
template <class Traits>
CUTE_DEVICE void store_packed(ForwardParams const& params, typename Traits::SharedStorage& shared,
                              TileSink<Traits> const& sink, float const (&lse)[kRowsPerThread],
                              int head, int first_row, int consumer, int thread) {
  const TileSequence sequence = sink.sequence(shared.barriers);
  const int rows = sequence.rows - first_row;  // of this consumer, and of those behind it
  const int row = sequence.q_begin + first_row;
  if (rows >= kConsumerRows) {
    if (thread == 0) send_output<Traits>(params, shared, row, head, 0, consumer);
  } else {
    copy_output_rows<Traits>(params, shared, row, rows, head, consumer, thread);
    if constexpr (Traits::kOOnV) {
      sync_named(NamedBarrier::kEpilogue, consumer,
                 kWarpgroupThreads);  // all have read: V may come
      if (thread == 0) shared.barriers.o_sent[consumer].arrive();
    }
  }
  if (params.lse == nullptr || thread % 4 != 0) return;
  const int own = thread / 32 * 16 + thread % 32 / 4;
  float* out = params.lse + static_cast<std::int64_t>(head) * params.packed.lengths.total_q + row;
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    const bool used = first_row + own + 8 * r < sequence.seqlen_q;  // else it is not the sink
    if (own + 8 * r < rows) out[own + 8 * r] = used ? lse[r] : -INFINITY;
  }
}

}  // namespace hopper_attention
