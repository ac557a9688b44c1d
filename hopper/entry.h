// What every entry point of the C interface shares: the thread's last error, the device, the guard.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <exception>
#include <string>

#include "status.h"

namespace hopper_attention {

// What hopper_attention_last_error() returns in this thread.
void set_last_error(std::string message);

Status cuda_failure(const char* what, cudaError_t error);

// The current device, which must be of compute capability 9.0, and its multiprocessors; asked of
// CUDA once a device.
Status current_device(int* device, int* num_sms);

// Runs function on a copy of *args and keeps its message; no exception passes. An older caller's
// struct is shorter: what it does not have is zero here.
template <class Args, class Function>
hopper_attention_status guarded(const Args* args, Function function) {
  Status status;
  try {
    if (args == nullptr) {
      status = Status::invalid("args is null");
    } else if (args->struct_size == 0 || args->struct_size > sizeof(*args)) {
      status = Status::invalid("struct_size is " + std::to_string(args->struct_size) +
                               "; this library knows 1 to " + std::to_string(sizeof(*args)));
    } else {
      Args known{};
      std::memcpy(&known, args, args->struct_size);
      status = function(known);
    }
  } catch (const std::exception& error) {
    status = {HOPPER_ATTENTION_CUDA_ERROR, error.what()};
  }
  set_last_error(status.message);
  return status.code;
}

}  // namespace hopper_attention
