#include "entry.h"

#include <atomic>
#include <utility>

namespace hopper_attention {
namespace {

thread_local std::string last_error;

constexpr int kMaxDevices = 64;

}  // namespace

void set_last_error(std::string message) { last_error = std::move(message); }

Status cuda_failure(const char* what, cudaError_t error) {
  const bool device_missing = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  return {device_missing ? HOPPER_ATTENTION_WRONG_DEVICE : HOPPER_ATTENTION_CUDA_ERROR,
          std::string(what) + ": " + cudaGetErrorString(error)};
}

Status current_device(int* device, int* num_sms) {
  static std::atomic<int> known_sms[kMaxDevices];
  cudaError_t error = cudaGetDevice(device);
  if (error != cudaSuccess) return cuda_failure("no CUDA device", error);
  if (*device >= kMaxDevices) {
    return {HOPPER_ATTENTION_WRONG_DEVICE, "device index above 63: " + std::to_string(*device)};
  }
  *num_sms = known_sms[*device].load(std::memory_order_relaxed);
  if (*num_sms > 0) return {};
  int major = 0, minor = 0;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, *device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, *device);
  }
  if (error != cudaSuccess) return cuda_failure("no CUDA device", error);
  if (major != 9 || minor != 0) {
    return {HOPPER_ATTENTION_WRONG_DEVICE, "device " + std::to_string(*device) +
                                               " has compute capability " + std::to_string(major) +
                                               "." + std::to_string(minor) +
                                               "; the kernels need 9.0 (H100, H200, GH200)"};
  }
  known_sms[*device].store(*num_sms, std::memory_order_relaxed);
  return {};
}

}  // namespace hopper_attention

extern "C" const char* hopper_attention_last_error(void) {
  return hopper_attention::last_error.c_str();
}
