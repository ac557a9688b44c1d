// The instances of the quantizer's kernel and their launch.
#include "quantize/launch.h"

#include <algorithm>

#include "common/chain.h"
#include "common/launch.cuh"
#include "quantize/kernel.cuh"

namespace hopper_attention {
namespace {

template <class Shape>
cudaError_t launch_shape(const QuantizeParams& params, const QuantizeMaps& maps,
                         const QuantizeLaunch& launch) {
  static std::atomic<unsigned long long> asked{0};
  constexpr int kBytes = sizeof(typename Shape::Shared);
  static_assert((kBytes + 1024) * Shape::kBlocksPerSm <= 228 * 1024);
  const auto kernel = quantize_kernel<Shape>;
  const cudaError_t error = allow_shared_memory(kernel, kBytes, launch.device, asked);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(params.schedule.num_tickets, launch.max_blocks));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = launch.stream;
  cudaLaunchAttribute attribute = early_start();
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params, maps);
}

template <class Element, bool kMixed>
cudaError_t launch_element(const QuantizeParams& params, const QuantizeMaps& maps,
                           const QuantizeLaunch& launch) {
  switch (launch.tile) {
    case 64:
      return launch_shape<QuantizeShape<64, Element, kMixed>>(params, maps, launch);
    case 128:
      return launch_shape<QuantizeShape<128, Element, kMixed>>(params, maps, launch);
    case 256:
      return launch_shape<QuantizeShape<256, Element, kMixed>>(params, maps, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_quantize(const QuantizeParams& params, const QuantizeMaps& maps,
                            const QuantizeLaunch& launch) {
  if (params.schedule.num_tickets == 0) return cudaSuccess;
  // The tensor cores take 16-bit numbers, which rotary embedding does not leave.
  if (params.hadamard_log2 >= 4 && params.rotary.dim == 0) {
    return launch.bfloat16 ? launch_element<__nv_bfloat16, true>(params, maps, launch)
                           : launch_element<__half, true>(params, maps, launch);
  }
  return launch.bfloat16 ? launch_element<__nv_bfloat16, false>(params, maps, launch)
                         : launch_element<__half, false>(params, maps, launch);
}

}  // namespace hopper_attention
