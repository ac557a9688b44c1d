// The launch of the quantizer's kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "quantize/geometry.h"
#include "quantize/params.h"

namespace hopper_attention {

// TMA descriptors, by QuantizeWhich; those that nobody uses are empty.
struct QuantizeMaps {
  CUtensorMap in[3];   // (head_dim, seqlen, heads, batch), boxes of 64 channels x 128 tokens
  CUtensorMap out[3];  // likewise, boxes of a warp's rows x up to 128 channels; no transposed V
};

struct QuantizeLaunch {
  int tile;       // head dimension that the instance is compiled for: 64, 128 or 256
  bool bfloat16;  // or fp16
  int device;
  int max_blocks;  // of threads that run at a time
  cudaStream_t stream;
};

// What begins as zero, and K's mean. The kernel of launch_quantize may start meanwhile.
cudaError_t launch_preparation(const QuantizeParams& params, const QuantizeLaunch& launch);

cudaError_t launch_quantize(const QuantizeParams& params, const QuantizeMaps& maps,
                            const QuantizeLaunch& launch);

}  // namespace hopper_attention
