// Launching a backward instance.
#pragma once

#include "backward/kernel.cuh"
#include "common/launch.cuh"

namespace hopper_attention {

template <class Instance>
cudaError_t launch_backward(const BackwardParams& params, const BackwardLaunchSpec& spec) {
  static std::atomic<unsigned long long> asked{0};
  constexpr int kBytes = shared_bytes(Instance::kConfig);
  const auto kernel = backward_kernel<Instance>;
  const cudaError_t error = allow_shared_memory(kernel, kBytes, spec.device, asked);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(spec.grid);
  launch.blockDim = dim3(num_threads(Instance::kConfig));
  launch.dynamicSmemBytes = kBytes;
  launch.stream = spec.stream;
  cudaLaunchAttribute attributes[2]{};
  attributes[launch.numAttrs++] = early_start();
  if (is_clustered(Instance::kConfig)) {
    cudaLaunchAttribute& cluster = attributes[launch.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = cluster_blocks(Instance::kConfig);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  launch.attrs = attributes;
  return cudaLaunchKernelEx(&launch, kernel, params);
}

}  // namespace hopper_attention
