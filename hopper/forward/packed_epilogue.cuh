// The epilogue of packed batches: no row of the next sequence is touched. Tiles are short here, so
// that its instructions, one after the other, count: addresses in shared memory are of 32 bits, and
// threads' numbers unsigned.
#pragma once

#include "forward/epilogue.cuh"

namespace hopper_attention {

// What is left of the softmax behind a tile's last P. Rows that a sequence has and does not use
// give 0 and -inf, whatever Q holds there.
template <class Traits>
CUTE_DEVICE void finish_packed_rows(ForwardParams const& params,
                                    typename Traits::SharedStorage& shared,
                                    TileSink<Traits> const& sink, int first_row, Softmax& softmax,
                                    float (&lse)[kRowsPerThread]) {
  const int used = sink.sequence(shared.barriers).seqlen_q - first_row;
  if (used < kConsumerRows) {
    const unsigned thread = fresh_thread() % kWarpgroupThreads;
    const int row = fragment_first_row(thread);
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      if (row + 8 * r >= used) softmax.sum[r] = 0.0f;
    }
  }
  softmax.finish_rows(read_sink(params, sink.tile(shared.barriers).tile.head), lse);
}

template <class Output>
CUTE_DEVICE void clear_unused_rows(Output& rO, int used, unsigned thread) {
  if (used >= kConsumerRows) return;
  const int row = fragment_first_row(thread);
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(rO))::value; ++i) {
    if (row + 8 * fragment_row(i) >= used) rO(i) = 0.0f;
  }
}

// The first num_rows rows (1 or more) of O from shared memory, to row `row` of the tensor.
template <class Traits>
CUTE_DEVICE void copy_output_rows(ForwardParams const& params,
                                  typename Traits::SharedStorage& shared, int row,
                                  unsigned num_rows, int head, int consumer, unsigned thread) {
  using Element = typename Traits::Element;
  constexpr unsigned kColumns = sizeof(uint4) / sizeof(Element);  // at a time
  constexpr unsigned kChunks = Traits::kHeadDimV / kColumns;
  constexpr unsigned kSlabChunks = Traits::kSlabV / kColumns;
  const PackedParams& packed = params.packed;
  const auto* staged = reinterpret_cast<const unsigned char*>(shared.o(consumer));
  auto* out = static_cast<Element*>(packed.out) + head * packed.out_stride_head;
  CUTE_NO_UNROLL
  for (unsigned i = thread; i < num_rows * kChunks; i += kWarpgroupThreads) {
    const unsigned from = i / kChunks, chunk = i % kChunks;
    if (chunk * kColumns >= params.head_dim_v) continue;
    const unsigned slab = chunk / kSlabChunks * kConsumerRows * kSlabChunks * sizeof(uint4);
    *reinterpret_cast<uint4*>(out + (row + from) * packed.out_stride_row + chunk * kColumns) =
        *reinterpret_cast<const uint4*>(staged + slab +
                                        staged_offset<Traits>(from, chunk % kSlabChunks));
  }
}

CUTE_DEVICE void store_packed_lse(ForwardParams const& params, TileSequence const& sequence,
                                  float const (&lse)[kRowsPerThread], int head, int first_row,
                                  unsigned thread) {
  if (params.lse == nullptr || thread % 4 != 0) return;
  const int own = fragment_first_row(thread);
  const int rows = sequence.rows - first_row, used = sequence.seqlen_q - first_row;
  float* out = params.lse + static_cast<std::int64_t>(head) * params.packed.lengths.total_q +
               (sequence.q_begin + first_row);
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    // Of a row that is not used it is -inf, not the sink.
    if (own + 8 * r < rows) out[own + 8 * r] = own + 8 * r < used ? lse[r] : -INFINITY;
  }
}

// From O in registers, which is owed softmax's alpha, to O and LSE in global memory: by TMA where
// all of a consumer's rows of a tile are the sequence's, else row by row.
template <class Traits, class Output>
CUTE_DEVICE void store_packed(ForwardParams const& params, typename Traits::SharedStorage& shared,
                              TileSink<Traits> const& sink, Softmax const& softmax, Output& rO,
                              float const (&lse)[kRowsPerThread], int first_row, int consumer,
                              unsigned thread) {
  const TileSequence sequence = sink.sequence(shared.barriers);  // read ahead of the barriers
  const int head = sink.tile(shared.barriers).tile.head;
  clear_unused_rows(rO, sequence.seqlen_q - first_row, thread);
  softmax.rescale(rO);
  stage_output<Traits>(shared, rO, consumer, thread);
  const int rows = sequence.rows - first_row;  // of this consumer, and of those behind it
  const int row = sequence.q_begin + first_row;
  if (rows >= kConsumerRows) {
    if (thread == 0) send_output<Traits>(params, shared, row, head, 0, consumer);
  } else {
    if (rows > 0) copy_output_rows<Traits>(params, shared, row, rows, head, consumer, thread);
    if constexpr (Traits::kOOnV) {
      sync_named(NamedBarrier::kEpilogue, consumer,
                 kWarpgroupThreads);  // all have read: V may come
      if (thread == 0) shared.barriers.o_sent[consumer].arrive();
    }
  }
  store_packed_lse(params, sequence, lse, head, first_row, thread);
}

}  // namespace hopper_attention
