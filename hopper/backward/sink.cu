// The gradient of the attention sinks, from what the preprocess left in the workspace.
//
// A head's sink t joins the denominator of each of its rows, so that with p = exp(t - LSE)
//   dO / dt = -p O  and  dLSE / dt = p,  and  dt = -sum over rows of p * (rowsum(dO * O) - dLSE),
// of which the bracket is delta.
#include "backward/params.h"

namespace hopper_attention {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr float kLog2E = 1.442695040888963407f;

__device__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
  return x;
}

// A block a head. Each thread adds up its rows, the block its threads', all in a fixed order: the
// same call gives the same bits.
__global__ void __launch_bounds__(kThreads) sink_kernel(__grid_constant__ const SinkParams params) {
  __shared__ float sums[kWarps];
  const int head = blockIdx.x;
  const float sink_log2 = params.sink[head] * kLog2E;
  float sum = 0.0f;
  if (params.seqlen_q > 0) {
    const int batches = kThreads / params.seqlen_q, rows = kThreads % params.seqlen_q;  // a step
    int batch = threadIdx.x / params.seqlen_q, row = threadIdx.x % params.seqlen_q;
#pragma unroll 4
    while (batch < params.batch) {
      const std::int64_t i =
          (static_cast<std::int64_t>(batch) * params.heads + head) * params.padded_rows + row;
      sum = fmaf(exp2f(sink_log2 - params.lse_log2[i]), params.delta[i], sum);
      batch += batches, row += rows;
      if (row >= params.seqlen_q) row -= params.seqlen_q, ++batch;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_sum(sums[threadIdx.x]);
  if (threadIdx.x == 0) params.dsink[head] = -sum;
}
static_assert(kWarps == 32, "the first warp adds up a sum a lane");

}  // namespace

cudaError_t launch_sink(const SinkParams& params, cudaStream_t stream) {
  if (params.heads == 0) return cudaSuccess;
  sink_kernel<<<params.heads, kThreads, 0, stream>>>(params);
  return cudaPeekAtLastError();
}

}  // namespace hopper_attention
