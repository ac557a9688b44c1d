// The launch of the kernels before the quantizer's own.
#include "quantize/prepare.cuh"

#include <algorithm>

namespace hopper_attention {
namespace {

__global__ void __launch_bounds__(kSumThreads)
    clear_kernel(const __grid_constant__ QuantizeParams params) {
  wait_for_last_kernel();
  let_next_start();
  clear(params);
}

}  // namespace

cudaError_t launch_preparation(const QuantizeParams& params, const QuantizeLaunch& launch) {
  if (params.schedule.num_tickets == 0) return cudaSuccess;
  const QuantizeTensor& k = params.tensors[kK];
  const std::int64_t vectors = params.num_zeros / 4;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(
      std::min<std::int64_t>((vectors + kSumThreads - 1) / kSumThreads, launch.max_blocks)));
  config.blockDim = dim3(kSumThreads);
  config.stream = launch.stream;
  cudaLaunchAttribute attribute = early_start();
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (!params.smooth_k) return cudaLaunchKernelEx(&config, clear_kernel, params);
  const std::int64_t tiles = (k.cu_seqlens != nullptr ? 1 : std::int64_t{k.batch}) * k.slots;
  if (tiles > 0) config.gridDim = dim3(static_cast<unsigned>(tiles * HeadsOfBlock(k).groups));
  const auto sum = tiles == 0        ? clear_kernel
                   : launch.bfloat16 ? sum_kernel<__nv_bfloat16>
                                     : sum_kernel<__half>;
  if (cudaError_t error = cudaLaunchKernelEx(&config, sum, params); error != cudaSuccess) {
    return error;
  }
  config.gridDim = dim3(static_cast<unsigned>(k.batch * k.heads));
  config.blockDim = dim3(kMeanThreads);
  return cudaLaunchKernelEx(&config, mean_kernel, params);
}

}  // namespace hopper_attention
