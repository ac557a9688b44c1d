// Launching a forward instance.
#pragma once

#include "common/launch.cuh"
#include "forward/kernel.cuh"

namespace hopper_attention {

template <class Instance>
cudaError_t launch_forward(const ForwardParams& params, const LaunchSpec& spec) {
  static std::atomic<unsigned long long> asked{0};
  constexpr int kBytes = shared_bytes(Instance::kConfig);
  const auto kernel = forward_kernel<Instance>;
  const cudaError_t error = allow_shared_memory(kernel, kBytes, spec.device, asked);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(spec.grid);
  launch.blockDim = dim3(num_threads(Instance::kConfig));
  launch.dynamicSmemBytes = kBytes;
  launch.stream = spec.stream;
  cudaLaunchAttribute attribute{};
  if constexpr (is_packed(Instance::kConfig)) {  // overlaps the kernel that lists the batch's tiles
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = params.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  launch.attrs = &attribute;
  launch.numAttrs = is_packed(Instance::kConfig) || is_clustered(Instance::kConfig) ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, params);
}

}  // namespace hopper_attention
