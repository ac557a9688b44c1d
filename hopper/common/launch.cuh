// What every launch of a kernel with much shared memory needs first.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace hopper_attention {

// More than 48 KiB of shared memory must be asked for, once a device. asked: of this kernel, a bit
// a device, of which entry.h allows 64.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes, int device,
                                std::atomic<unsigned long long>& asked) {
  const unsigned long long bit = 1ull << (device & 63);
  if (asked.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) asked.fetch_or(bit, std::memory_order_release);
  return error;
}

}  // namespace hopper_attention
