// Launching a forward instance.
#pragma once

#include <atomic>

#include "forward/kernel.cuh"

namespace hopper_attention {

// More than 48 KiB of shared memory must be asked for, once a device.
template <class Instance>
cudaError_t allow_shared_memory(int device) {
  static std::atomic<unsigned long long> done{0};  // a bit a device
  const unsigned long long bit = 1ull << (device & 63);
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(forward_kernel<Instance>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shared_bytes(Instance::kConfig));
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return error;
}

template <class Instance>
cudaError_t launch_forward(const ForwardParams& params, const LaunchSpec& spec) {
  const cudaError_t error = allow_shared_memory<Instance>(spec.device);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(spec.grid);
  launch.blockDim = dim3(num_threads(Instance::kConfig));
  launch.dynamicSmemBytes = shared_bytes(Instance::kConfig);
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
  return cudaLaunchKernelEx(&launch, forward_kernel<Instance>, params);
}

}  // namespace hopper_attention
