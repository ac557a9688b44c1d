// The part of DLPack's C exchange interface (version 1 of its ABI) that reads tensors and the
// current stream: PyTorch publishes it, from 2.10 on, as torch.Tensor.__dlpack_c_exchange_api__.
// Layouts are those of https://github.com/dmlc/dlpack, include/dlpack/dlpack.h.
#pragma once

#include <cstdint>

constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
constexpr std::uint32_t kExchangeMajor = 1;

struct ExchangeDevice {
  std::int32_t type, id;
};

struct ExchangeTensor {
  void* data;
  ExchangeDevice device;
  std::int32_t ndim;
  std::uint8_t dtype_code, dtype_bits;
  std::uint16_t dtype_lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Borrows: what it writes is valid as long as the tensor is. Not 0 with Python's error set where
  // it fails. May be null.
  int (*tensor_from_py_object)(void* object, ExchangeTensor* tensor);
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};
