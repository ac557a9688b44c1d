// What runs before the main kernel: delta, LSE in base 2, zeros where it adds, and for packed
// batches the list of key blocks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "backward/list_keys.cuh"
#include "backward/query_block.cuh"
#include "common/chain.h"

namespace hopper_attention {
namespace {

constexpr int kThreads = 512;  // at d256 a whole block of queries is on its way at once
constexpr float kLog2E = 1.442695040888963407f;

__device__ float2 widen(__half2 x) { return __half22float2(x); }
__device__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }

// The dot product of eight neighbours.
template <class Pair>
__device__ float dot(uint4 const& a, uint4 const& b) {
  const Pair* x = reinterpret_cast<const Pair*>(&a);
  const Pair* y = reinterpret_cast<const Pair*>(&b);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = widen(x[i]), w = widen(y[i]);
    sum = fmaf(u.x, w.x, fmaf(u.y, w.y, sum));
  }
  return sum;
}

__device__ uint4 load(StridedTensor const& tensor, int batch, int row, int head, int column) {
  const std::int64_t offset =
      batch * tensor.stride_batch + row * tensor.stride_seq + head * tensor.stride_head + column;
  return *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(tensor.data) + offset);
}

// Where the main kernel adds: dQ, the turns of a fixed order, and the tickets.
__device__ void zero_sums(PreprocessParams const& params, QueryBlock const& own,
                          std::int64_t block) {
  // Where no row asks only the sinks' gradient reads the block: its statistics.
  const int dq_groups = own.used > 0 ? params.dq_layout.elements() / 4 : 0;
  float4* dq = reinterpret_cast<float4*>(params.workspace.dq) + block * dq_groups;
  for (int i = threadIdx.x; i < dq_groups; i += kThreads) dq[i] = make_float4(0, 0, 0, 0);
  if (threadIdx.x > 0) return;
  if (params.workspace.turns != nullptr) params.workspace.turns[block] = 0;
  if (params.workspace.tickets != nullptr && block == 0) *params.workspace.tickets = 0;
}

// A block a block of queries; kLanes threads a row. kPacked: the first block makes the list.
template <class Pair, int kLanes, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    preprocess_kernel(__grid_constant__ const PreprocessParams params) {
  extern __shared__ int place_of[];
  let_next_start();
  if (kPacked && blockIdx.x == 0) {
    const KeyListJob job{params.list, params.mask, params.queries.tile_m, params.entry_keys,
                         params.workspace.turns != nullptr};
    list_key_blocks<kThreads>(job, place_of);
    return;
  }
  const int block_idx = kPacked ? blockIdx.x - 1 : blockIdx.x;
  const QueryBlock own = query_block<kPacked>(params.queries, block_idx);
  const int tile_m = params.queries.tile_m;
  const std::int64_t block = block_idx;

  // What a thread reads of a few rows is on its way all at once, and all of it before the zeros.
  constexpr int kRowsApart = kThreads / kLanes, kRowsAtOnce = 4;
  const int column = threadIdx.x % kLanes * 8;
  const bool leads = column == 0;
  bool zeroed = false;
  for (int first = threadIdx.x / kLanes; first < tile_m; first += kRowsAtOnce * kRowsApart) {
    uint4 out[kRowsAtOnce], dout[kRowsAtOnce];
    float lse[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int local = first + i * kRowsApart, row = own.row + local;
      const bool exists = local < own.used;
      out[i] = dout[i] = uint4{};
      if (exists && column < params.head_dim_v) {
        out[i] = load(params.out, own.batch, row, own.head, column);
        dout[i] = load(params.dout, own.batch, row, own.head, column);
      }
      lse[i] = exists && leads ? params.lse[own.lse + local] : -INFINITY;
    }
    if (!zeroed) zero_sums(params, own, block);
    zeroed = true;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int local = first + i * kRowsApart;
      float delta = dot<Pair>(out[i], dout[i]);
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        delta += __shfl_xor_sync(0xffffffff, delta, lanes);
      }
      // tile_m is a multiple of 16 and a warp's rows are at most 4: a warp comes as a whole.
      if (!leads || local >= tile_m) continue;
      const std::int64_t to = block * tile_m + local;
      params.workspace.lse_log2[to] = lse[i] == -INFINITY ? INFINITY : lse[i] * kLog2E;
      if (params.dlse != nullptr && local < own.used) delta -= params.dlse[own.lse + local];
      params.workspace.delta[to] = delta;
    }
  }
}

template <class Pair, bool kPacked>
void launch(const PreprocessParams& params, cudaStream_t stream) {
  const QueryGrid& queries = params.queries;
  const int grid = queries.num_m_blocks * queries.heads * queries.batch + (kPacked ? 1 : 0);
  const int bytes = kPacked ? kListCounters * static_cast<int>(sizeof(int)) : 0;
  if (params.head_dim_v <= 64) {
    preprocess_kernel<Pair, 8, kPacked><<<grid, kThreads, bytes, stream>>>(params);
  } else if (params.head_dim_v <= 128) {
    preprocess_kernel<Pair, 16, kPacked><<<grid, kThreads, bytes, stream>>>(params);
  } else {
    preprocess_kernel<Pair, 32, kPacked><<<grid, kThreads, bytes, stream>>>(params);
  }
}

template <class Pair>
void launch(const PreprocessParams& params, cudaStream_t stream) {
  if (params.queries.packed) {
    launch<Pair, true>(params, stream);
  } else {
    launch<Pair, false>(params, stream);
  }
}

__global__ void __launch_bounds__(kThreads)
    zero_kernel(StridedTensor tensor, int seqlen, int heads, int chunks, std::int64_t total) {
  const std::int64_t i = blockIdx.x * std::int64_t(kThreads) + threadIdx.x;
  if (i >= total) return;
  const std::int64_t head = i / chunks, row = head / heads, batch = row / seqlen;
  const std::int64_t offset = batch * tensor.stride_batch + row % seqlen * tensor.stride_seq +
                              head % heads * tensor.stride_head + i % chunks * 8;
  *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(tensor.data) + offset) = uint4{};
}

}  // namespace

cudaError_t launch_zero(const StridedTensor& tensor, int batch, int seqlen, int heads, int head_dim,
                        cudaStream_t stream) {
  const int chunks = head_dim / 8;
  const std::int64_t total = std::int64_t(batch) * seqlen * heads * chunks;
  if (total == 0) return cudaSuccess;
  zero_kernel<<<static_cast<unsigned int>((total + kThreads - 1) / kThreads), kThreads, 0,
                stream>>>(tensor, seqlen, heads, chunks, total);
  return cudaPeekAtLastError();
}

cudaError_t launch_preprocess(const PreprocessParams& params, cudaStream_t stream) {
  if (params.bfloat16) {
    launch<__nv_bfloat162>(params, stream);
  } else {
    launch<__half2>(params, stream);
  }
  return cudaPeekAtLastError();
}

}  // namespace hopper_attention
