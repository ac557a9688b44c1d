// What runs after the main kernel: dQ out of its fp32 accumulator, scaled and rounded to 16 bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backward/params.h"

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
template <class Element>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(__grid_constant__ const ConvertParams params) {
  extern __shared__ __align__(16) unsigned char shared[];
  Element* tile = reinterpret_cast<Element*>(shared);
  const DqLayout layout = params.dq_layout;
  const int m_block = blockIdx.x % params.num_m_blocks;
  const int pair = blockIdx.x / params.num_m_blocks;  // batch * heads + head
  const int head = pair % params.heads, batch = pair / params.heads;
  const int stride = layout.head_dim + kPadding;
  const int groups = layout.elements() / 4;

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
  const int rows = min(layout.tile_m, params.seqlen_q - m_block * layout.tile_m);
  Element* out = static_cast<Element*>(params.dq.data) + batch * params.dq.stride_batch +
                 head * params.dq.stride_head +
                 std::int64_t(m_block) * layout.tile_m * params.dq.stride_seq;
  for (int i = threadIdx.x; i < rows * chunks; i += kThreads) {
    const int row = i / chunks, column = i % chunks * 8;
    *reinterpret_cast<uint4*>(out + row * params.dq.stride_seq + column) =
        *reinterpret_cast<const uint4*>(tile + row * stride + column);
  }
}

}  // namespace

cudaError_t launch_convert(const ConvertParams& params, cudaStream_t stream) {
  const int grid = params.num_m_blocks * params.heads * params.batch;
  // At most 64 x (256 + 8) x 2 bytes or 128 x (64 + 8) x 2: below 48 KiB.
  const int bytes = params.dq_layout.tile_m * (params.dq_layout.head_dim + kPadding) * 2;
  if (params.bfloat16) {
    convert_kernel<__nv_bfloat16><<<grid, kThreads, bytes, stream>>>(params);
  } else {
    convert_kernel<__half><<<grid, kThreads, bytes, stream>>>(params);
  }
  return cudaPeekAtLastError();
}

}  // namespace hopper_attention
