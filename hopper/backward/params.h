// What a backward launch passes to its kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper_attention/backward_packed.h"
#include "hopper_attention/dq_layout.h"
#include "hopper_attention/mask.h"
#include "hopper_attention/tile_order.h"

namespace hopper_attention {

// The caller's workspace. Rows are those of the query blocks: seqlen_q rounded up to tile_m. For
// packed batches `batch` is 1 and the blocks are laid out as first_query_block says.
struct BackwardWorkspace {
  float* dq;            // (batch, heads, query blocks, DqLayout::elements())
  float* lse_log2;      // (batch, heads, rows): LSE in base 2; +inf for rows without keys and past
                        // the end, so that their P is 0
  float* delta;         // (batch, heads, rows): rowsum(dO * O) - dLSE; 0 past the end
  unsigned int* turns;  // (batch, heads, query blocks): key blocks that have added their dQ; null
                        // where the order of the adds is free
  unsigned int* tickets;  // tiles that persistent blocks have drawn; null where they are not
};

struct BackwardParams {
  // In kernels that serve packed batches, with the rows of ragged.h: (head_dim, row, heads, shift
  // or batch, wrap).
  CUtensorMap q;     // (head_dim, seqlen_q, heads, batch), boxes of one slab x tile_m
  CUtensorMap dout;  // (head_dim_v, seqlen_q, heads, batch), boxes of one slab x tile_m
  CUtensorMap k;     // (head_dim, seqlen_k, heads_kv, batch), boxes of one slab x tile_n
  CUtensorMap v;     // (head_dim_v, seqlen_k, heads_kv, batch), boxes of one slab x tile_n
  CUtensorMap dk;    // as k, boxes of one slab x gradient_rows
  CUtensorMap dv;    // as v, boxes of one slab x gradient_rows
  BackwardWorkspace workspace;

  Mask mask;
  TileOrder order;  // of key blocks and KV heads
  int num_m_blocks;
  int heads_per_kv;
  bool descending;  // QuerySteps'
  bool last_first;  // key_block's and add_turn's

  // P = exp2(scale_log2 * S - LSE_log2); where cap_log2 is not 0, scale_log2 * S is
  // cap_log2 * tanh(S * inner_scale).
  float scale_log2;
  float softmax_scale;
  float cap_log2;
  float inner_scale;

  KeyList list;  // of packed batches; there mask is made for the totals
};

struct BackwardLaunchSpec {
  int grid;
  int device;
  cudaStream_t stream;
};

using BackwardLauncher = cudaError_t (*)(const BackwardParams&, const BackwardLaunchSpec&);

// A (batch, seqlen, heads, head_dim) tensor; strides in elements, 16 bytes' multiples.
struct StridedTensor {
  void* data;
  std::int64_t stride_batch;
  std::int64_t stride_seq;
  std::int64_t stride_head;
};

// Which queries the kernels before and after the main one go through.
struct QueryGrid {
  int seqlen_q;
  int heads;
  int batch;  // 1 where packed
  int num_m_blocks;
  int tile_m;
  bool packed;
  PackedLengths lengths;  // where packed
};

struct PreprocessParams {
  StridedTensor out;
  StridedTensor dout;
  const float* lse;   // (batch, heads, seqlen_q)
  const float* dlse;  // likewise; may be null
  BackwardWorkspace workspace;
  DqLayout dq_layout;
  QueryGrid queries;
  int head_dim_v;
  bool bfloat16;

  KeyList list;    // of packed batches: to be made
  Mask mask;       // for the totals
  int entry_keys;  // of an entry of the list
};

struct ConvertParams {
  StridedTensor dq;
  const float* accumulator;  // BackwardWorkspace::dq
  DqLayout dq_layout;
  QueryGrid queries;
  int head_dim;
  float scale;
  bool bfloat16;
};

struct SinkParams {
  const float* sink;      // (heads)
  const float* lse_log2;  // BackwardWorkspace's, as is delta
  const float* delta;
  float* dsink;  // (heads)
  int seqlen_q;
  int padded_rows;  // of a head in the workspace
  int heads;
  int batch;
};

// Before the main kernel: delta, LSE in base 2, zeros where it adds, and the list of key blocks.
// After it: dQ in 16 bits.
cudaError_t launch_preprocess(const PreprocessParams& params, cudaStream_t stream);
cudaError_t launch_convert(const ConvertParams& params, cudaStream_t stream);

// After the preprocess: the gradient of the attention sinks.
cudaError_t launch_sink(const SinkParams& params, cudaStream_t stream);

// Zeros in a tensor of 16-bit numbers.
cudaError_t launch_zero(const StridedTensor& tensor, int batch, int seqlen, int heads, int head_dim,
                        cudaStream_t stream);

}  // namespace hopper_attention
