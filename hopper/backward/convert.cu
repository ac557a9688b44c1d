// What runs after the main kernel: dQ out of its fp32 accumulator, scaled and rounded to 16 bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backward/query_block.cuh"

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

// A block a block of queries.
template <class Element, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(__grid_constant__ const ConvertParams params) {
  extern __shared__ __align__(16) unsigned char shared[];
  Element* tile = reinterpret_cast<Element*>(shared);
  const DqLayout layout = params.dq_layout;
  const QueryBlock own = query_block<kPacked>(params.queries, blockIdx.x);
  const int stride = layout.head_dim + kPadding;
  // Of rows that do not ask there is no dQ, and may be no accumulator.
  const int groups = own.used > 0 ? layout.elements() / 4 : 0;

  const float4* from =
      reinterpret_cast<const float4*>(params.accumulator) + blockIdx.x * std::int64_t(groups);
  const int beside = layout.transposed() ? stride : 1;  // from an element to its neighbour
  const int below = layout.transposed() ? 8 : 8 * stride;
#pragma unroll 4
  for (int i = threadIdx.x; i < groups; i += kThreads) {
    const float4 x = from[i];
    const DqPosition position = layout(i);
    Element* to = tile + position.row * stride + position.column;
    to[0] = narrow<Element>(x.x * params.scale);
    to[beside] = narrow<Element>(x.y * params.scale);
    to[below] = narrow<Element>(x.z * params.scale);
    to[below + beside] = narrow<Element>(x.w * params.scale);
  }
  __syncthreads();

  const int chunks = params.head_dim / 8;
  Element* out = static_cast<Element*>(params.dq.data) + own.batch * params.dq.stride_batch +
                 own.head * params.dq.stride_head + own.row * params.dq.stride_seq;
  for (int i = threadIdx.x; i < own.rows * chunks; i += kThreads) {
    const int row = i / chunks, column = i % chunks * 8;
    uint4 value{};
    if (!kPacked || row < own.used) {
      value = *reinterpret_cast<const uint4*>(tile + row * stride + column);
    }
    *reinterpret_cast<uint4*>(out + row * params.dq.stride_seq + column) = value;
  }
}

template <class Element>
void launch(const ConvertParams& params, cudaStream_t stream) {
  const QueryGrid& queries = params.queries;
  const int grid = queries.num_m_blocks * queries.heads * queries.batch;
  // At most 64 x (256 + 8) x 2 bytes or 128 x (64 + 8) x 2: below 48 KiB.
  const int bytes = params.dq_layout.tile_m * (params.dq_layout.head_dim + kPadding) * 2;
  if (queries.packed) {
    convert_kernel<Element, true><<<grid, kThreads, bytes, stream>>>(params);
  } else {
    convert_kernel<Element, false><<<grid, kThreads, bytes, stream>>>(params);
  }
}

}  // namespace

cudaError_t launch_convert(const ConvertParams& params, cudaStream_t stream) {
  if (params.bfloat16) {
    launch<__nv_bfloat16>(params, stream);
  } else {
    launch<__half>(params, stream);
  }
  return cudaPeekAtLastError();
}

}  // namespace hopper_attention
