// Launches of the quantizer's kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "quantize/params.h"

namespace hopper_attention {

struct QuantizeLaunch {
  int tile;       // head dimension that the instance is compiled for: 64, 128 or 256
  bool bfloat16;  // or fp16
  int device;
  int num_sms;
  cudaStream_t stream;
};

// First pass: the largest values and the sums over blocks that params asks for.
cudaError_t launch_quantize_stats(const QuantizeParams& params, const QuantizeLaunch& launch);
// K's sums over blocks to its mean.
cudaError_t launch_quantize_mean(const QuantizeParams& params, const QuantizeLaunch& launch);
// Second pass: the quantized tensors and their scales.
cudaError_t launch_quantize(const QuantizeParams& params, const QuantizeLaunch& launch);

}  // namespace hopper_attention
