// The instances of the quantizer's kernels and their launches.
#include "quantize/launch.h"

#include <algorithm>
#include <atomic>

#include "quantize/kernel.cuh"

namespace hopper_attention {
namespace {

// More than 48 KiB of shared memory must be asked for, once a device.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes, int device,
                                std::atomic<unsigned long long>& done) {
  const unsigned long long bit = 1ull << (device & 63);
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return error;
}

template <class Shape, QuantizePass kPass>
cudaError_t launch_shape(const QuantizeParams& params, const QuantizeLaunch& launch) {
  static std::atomic<unsigned long long> done{0};  // a bit a device
  constexpr int kBytes = sizeof(typename Shape::Shared);
  const auto kernel = quantize_kernel<Shape, kPass>;
  const cudaError_t error = allow_shared_memory(kernel, kBytes, launch.device, done);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(params.num_tasks, launch.num_sms * Shape::kBlocksPerSm));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = launch.stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <QuantizePass kPass, class Element>
cudaError_t launch_element(const QuantizeParams& params, const QuantizeLaunch& launch) {
  switch (launch.tile) {
    case 64:
      return launch_shape<QuantizeShape<64, Element>, kPass>(params, launch);
    case 128:
      return launch_shape<QuantizeShape<128, Element>, kPass>(params, launch);
    case 256:
      return launch_shape<QuantizeShape<256, Element>, kPass>(params, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

template <QuantizePass kPass>
cudaError_t launch_pass(const QuantizeParams& params, const QuantizeLaunch& launch) {
  if (params.num_tasks == 0) return cudaSuccess;
  return launch.bfloat16 ? launch_element<kPass, __nv_bfloat16>(params, launch)
                         : launch_element<kPass, __half>(params, launch);
}

}  // namespace

cudaError_t launch_quantize_stats(const QuantizeParams& params, const QuantizeLaunch& launch) {
  return launch_pass<QuantizePass::kStats>(params, launch);
}

cudaError_t launch_quantize_mean(const QuantizeParams& params, const QuantizeLaunch& launch) {
  const QuantizeTensor& k = params.tensors[kK];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(k.batch * k.heads, (k.head_dim + 31) / 32);
  config.blockDim = dim3(32, kMeanWays);
  config.stream = launch.stream;
  return cudaLaunchKernelEx(&config, quantize_mean_kernel, params);
}

cudaError_t launch_quantize(const QuantizeParams& params, const QuantizeLaunch& launch) {
  return launch_pass<QuantizePass::kQuantize>(params, launch);
}

}  // namespace hopper_attention
