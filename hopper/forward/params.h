// What a forward launch passes to its kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper_attention/mask.h"
#include "hopper_attention/tile_order.h"

namespace hopper_attention {

struct ForwardParams {
  CUtensorMap q;    // (head_dim, seqlen_q, heads, batch), boxes of one slab x kConsumerRows
  CUtensorMap k;    // (head_dim, seqlen_k, heads_kv, batch), boxes of one slab x tile_n
  CUtensorMap v;    // (head_dim_v, seqlen_k, heads_kv, batch), boxes of one slab x tile_n
  CUtensorMap out;  // (head_dim_v, seqlen_q, heads, batch), boxes of one slab x kConsumerRows
  float* lse;       // (batch, heads, seqlen_q), may be null
  unsigned int* counters;  // [0] the next tile, [1] blocks that are done; zero between launches

  Mask mask;
  TileOrder order;
  int heads_per_kv;

  // P = exp2(scale_log2 * (S - rowmax(S))). transform_scores: S is first replaced by
  // cap * tanh(S * inner_scale), or by S * inner_scale where cap is 0.
  float scale_log2;
  bool transform_scores;
  float inner_scale;
  float cap;
};

struct LaunchSpec {
  int grid;
  int device;
  cudaStream_t stream;
};

using ForwardLauncher = cudaError_t (*)(const ForwardParams&, const LaunchSpec&);

}  // namespace hopper_attention
