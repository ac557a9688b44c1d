// Launching a backward instance.
#pragma once

#include <atomic>

#include "backward/kernel.cuh"

namespace hopper_attention {

// More than 48 KiB of shared memory must be asked for, once a device.
template <class Instance>
cudaError_t allow_backward_memory(int device) {
  static std::atomic<unsigned long long> done{0};  // a bit a device
  const unsigned long long bit = 1ull << (device & 63);
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(backward_kernel<Instance>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shared_bytes(Instance::kConfig));
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return error;
}

template <class Instance>
cudaError_t launch_backward(const BackwardParams& params, const BackwardLaunchSpec& spec) {
  const cudaError_t error = allow_backward_memory<Instance>(spec.device);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(spec.grid);
  launch.blockDim = dim3(num_threads(Instance::kConfig));
  launch.dynamicSmemBytes = shared_bytes(Instance::kConfig);
  launch.stream = spec.stream;
  cudaLaunchAttribute attributes[2]{};
  attributes[launch.numAttrs++] = early_start();
  if (is_clustered(Instance::kConfig)) {
    cudaLaunchAttribute& cluster = attributes[launch.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = Instance::kConfig.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  launch.attrs = attributes;
  return cudaLaunchKernelEx(&launch, backward_kernel<Instance>, params);
}

}  // namespace hopper_attention
