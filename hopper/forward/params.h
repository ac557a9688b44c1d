// What a forward launch passes to its kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper_attention/fp8.h"
#include "hopper_attention/mask.h"
#include "hopper_attention/packed.h"
#include "hopper_attention/tile_order.h"

namespace hopper_attention {

// Of packed batches alone. There `batch` is 1 in every tensor and a sequence length is a total;
// mask is made for the totals.
struct PackedParams {
  PackedLengths lengths;
  PackedOrder order;
  PackedDivides divides;
  PackedStart start;
  PackedHeader* header;
  TileEntry* entries;
  int max_entries;  // the first ones included
  void* out;        // what TMA stores to, for rows that it cannot store
  std::int64_t out_stride_row;
  std::int64_t out_stride_head;
};

struct ForwardParams {
  CUtensorMap q;    // (head_dim, seqlen_q, heads, batch), boxes of one slab x kConsumerRows
  CUtensorMap k;    // (head_dim, seqlen_k, heads_kv, batch), boxes of one slab x tile_n
  CUtensorMap v;    // (head_dim_v, seqlen_k, heads_kv, batch), boxes of one slab x tile_n; or
                    // transposed, (keys, head_dim_v, heads_kv, batch), boxes of tile_n x head_dim_v
  CUtensorMap out;  // (head_dim_v, seqlen_q, heads, batch), boxes of one slab x kConsumerRows
  float* lse;       // (batch, heads, seqlen_q), may be null
  unsigned int* counters;  // [0] the next tile, [1] blocks that are done; zero between launches

  Mask mask;
  TileOrder order;
  int cluster;  // blocks that share their loads of K and V, and as many tiles of the order's each
  int heads_per_kv;

  // P = exp2(scale_log2 * (S - rowmax(S))). transform_scores: S is first replaced by
  // cap * tanh(S * inner_scale), or by S * inner_scale where cap is 0.
  float scale_log2;
  bool transform_scores;
  float inner_scale;
  float cap;

  ScaleParams scales;  // of e4m3, as is the rest
  int head_dim_v;
  bool v_transposed;
  bool out_float16;  // else bfloat16

  const float* sink;  // (heads) logits, may be null; of every dtype

  PackedParams packed;
};

struct LaunchSpec {
  int grid;
  int device;
  cudaStream_t stream;
};

// Lists the tiles of a packed batch, for the kernel that follows on the stream.
cudaError_t launch_list_tiles(const PackedParams& packed, const Mask& mask, int tile_m, int tile_n,
                              cudaStream_t stream);

using ForwardLauncher = cudaError_t (*)(const ForwardParams&, const LaunchSpec&);

}  // namespace hopper_attention
