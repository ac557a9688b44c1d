#include "common/tensor_map.h"

#include <cuda_runtime_api.h>

#include "hopper_attention/ragged.h"

namespace hopper_attention {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looked up at run time: linking libcuda would make the library unloadable without a driver.
EncodeTiled find_encode_tiled() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(entry);
}

// A dimension of size 1 may carry any stride; TMA wants a multiple of 16 bytes all the same.
cuuint64_t byte_stride(int size, std::int64_t stride, TensorType type) {
  return size == 1 ? 16 : static_cast<cuuint64_t>(stride) * bytes_of(type);
}

constexpr CUtensorMapDataType data_type(TensorType type) {
  switch (type) {
    case TensorType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case TensorType::kBfloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

constexpr CUtensorMapSwizzle swizzle(int bytes) {
  if (bytes == 128) return CU_TENSOR_MAP_SWIZZLE_128B;
  return bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

// sizes: kRank of them; strides: of all but the first.
template <int kRank>
const char* encode(CUtensorMap* map, const void* data, const cuuint64_t (&sizes)[kRank],
                   const cuuint64_t (&strides)[kRank - 1], TensorBox box, TensorType type) {
  static const EncodeTiled encode_tiled = find_encode_tiled();
  if (encode_tiled == nullptr) {
    return "the driver has no cuTensorMapEncodeTiled (CUDA 12.0 or newer)";
  }
  cuuint32_t box_sizes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) box_sizes[i] = steps[i] = 1;
  box_sizes[0] = static_cast<cuuint32_t>(box.columns);
  box_sizes[1] = static_cast<cuuint32_t>(box.rows);
  const CUresult result =
      encode_tiled(map, data_type(type), kRank, const_cast<void*>(data), sizes, strides, box_sizes,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle(box.columns * bytes_of(type)),
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the tensor";
}

}  // namespace

const char* encode_tensor_map(CUtensorMap* map, const TensorView& view, TensorBox box,
                              TensorType type) {
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(view.head_dim), static_cast<cuuint64_t>(view.seqlen),
      static_cast<cuuint64_t>(view.heads), static_cast<cuuint64_t>(view.batch)};
  const cuuint64_t strides[] = {byte_stride(view.seqlen, view.stride_seq, type),
                                byte_stride(view.heads, view.stride_head, type),
                                byte_stride(view.batch, view.stride_batch, type)};
  return encode<4>(map, view.data, sizes, strides, box, type);
}

const char* encode_ragged_tensor_map(CUtensorMap* map, const TensorView& view, bool packed,
                                     TensorBox box, TensorType type) {
  const cuuint64_t row = byte_stride(view.seqlen, view.stride_seq, type);
  const cuuint64_t head = byte_stride(view.heads, view.stride_head, type);
  const auto columns = static_cast<cuuint64_t>(view.head_dim);
  const auto heads = static_cast<cuuint64_t>(view.heads);
  if (packed) {
    const cuuint64_t sizes[] = {columns, kRaggedRows, heads, kMaxShift, kMaxShift};
    const cuuint64_t strides[] = {row, head, row, wrap_stride(row)};
    return encode<5>(map, view.data, sizes, strides, box, type);
  }
  const cuuint64_t sizes[] = {columns, static_cast<cuuint64_t>(view.seqlen), heads,
                              static_cast<cuuint64_t>(view.batch), 1};
  const cuuint64_t strides[] = {row, head, byte_stride(view.batch, view.stride_batch, type), 16};
  return encode<5>(map, view.data, sizes, strides, box, type);
}

}  // namespace hopper_attention
