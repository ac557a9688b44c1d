// What runs after the main kernel: dQ out of its fp32 accumulator, scaled and rounded to 16 bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "backward/query_block.cuh"
#include "common/chain.h"

namespace hopper_attention {
namespace {

constexpr int kThreads = 256;
constexpr int kPadding = 8;  // elements after each row in shared memory, against bank conflicts

template <class Element>
__device__ Element narrow(float x);
template <>
__device__ __half narrow(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 narrow(float x) {
  return __float2bfloat16_rn(x);
}

// The layout is a function of the tile's head dimension: known when compiled, an element's place
// costs no division.
template <int kHeadDim>
constexpr DqLayout kLayout =
    make_dq_layout(make_backward_config({Dtype::kBfloat16, kHeadDim, kHeadDim, MaskKind::kFull}));
#define HOPPER_ATTENTION_BACKWARD(name, dtype, head_dim, head_dim_v, mask)                       \
  static_assert(make_dq_layout(make_backward_config(                                             \
                    {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask})) == kLayout<head_dim>, \
                #name);
#include "backward/instances.def"
#undef HOPPER_ATTENTION_BACKWARD

template <class Element>
__device__ std::uint32_t narrow_pair(float x, float y) {
  const Element pair[2] = {narrow<Element>(x), narrow<Element>(y)};
  std::uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// Two columns of a row, and those eight rows below.
template <int kStride, class Element>
__device__ void put(Element* tile, DqPosition at, float4 x, float scale) {
  auto* to = reinterpret_cast<std::uint32_t*>(tile + at.row * kStride + at.column);
  to[0] = narrow_pair<Element>(x.x * scale, x.y * scale);
  to[8 * kStride / 2] = narrow_pair<Element>(x.z * scale, x.w * scale);
}

// A block a block of queries.
template <class Element, int kHeadDim, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(__grid_constant__ const ConvertParams params) {
  constexpr DqLayout kOwn = kLayout<kHeadDim>;
  constexpr int kStride = kHeadDim + kPadding, kGroups = kOwn.elements() / 4;
  static_assert(kGroups % kThreads == 0, "no remainder");
  __shared__ __align__(16) Element tile[kOwn.tile_m * kStride];
  const QueryBlock own = query_block<kPacked>(params.queries, blockIdx.x);
  wait_for_last_kernel();

  if (own.used > 0) {  // else there is no dQ, and may be no accumulator
    const float4* from = reinterpret_cast<const float4*>(params.accumulator) +
                         blockIdx.x * std::int64_t(kGroups) + threadIdx.x;
    constexpr int kLoads = 8;  // on their way at a time
#pragma unroll kLoads
    for (int i = 0; i < kGroups; i += kThreads) {
      put<kStride>(tile, kOwn(i + threadIdx.x), __ldcs(from + i), params.scale);
    }
  }
  __syncthreads();

  constexpr int kChunks = kHeadDim / 8;
  Element* out = static_cast<Element*>(params.dq.data) + own.batch * params.dq.stride_batch +
                 own.head * params.dq.stride_head + own.row * params.dq.stride_seq;
#pragma unroll 4
  for (int i = threadIdx.x; i < own.rows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (column >= params.head_dim) continue;
    uint4 value{};
    if (!kPacked || row < own.used) {
      value = *reinterpret_cast<const uint4*>(tile + row * kStride + column);
    }
    *reinterpret_cast<uint4*>(out + row * params.dq.stride_seq + column) = value;
  }
}

template <class Element, int kHeadDim>
cudaError_t launch(const ConvertParams& params, cudaStream_t stream) {
  const QueryGrid& queries = params.queries;
  const int grid = queries.num_m_blocks * queries.heads * queries.batch;
  cudaLaunchAttribute early = early_start();
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(grid);
  launch.blockDim = dim3(kThreads);
  launch.stream = stream;
  launch.attrs = &early;
  launch.numAttrs = 1;
  const auto kernel = queries.packed ? convert_kernel<Element, kHeadDim, true>
                                     : convert_kernel<Element, kHeadDim, false>;
  return cudaLaunchKernelEx(&launch, kernel, params);
}

template <class Element>
cudaError_t launch(const ConvertParams& params, cudaStream_t stream) {
  switch (params.dq_layout.head_dim) {
    case 64:
      return launch<Element, 64>(params, stream);
    case 96:
      return launch<Element, 96>(params, stream);
    case 128:
      return launch<Element, 128>(params, stream);
    case 192:
      return launch<Element, 192>(params, stream);
    case 256:
      return launch<Element, 256>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_convert(const ConvertParams& params, cudaStream_t stream) {
  return params.bfloat16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace hopper_attention
