// Sums of what comes before, over a warp's lanes and over an array of shared memory.
#pragma once

#include <cuda_runtime_api.h>

namespace hopper_attention {

// The sum of value over this lane and those before it; all lanes call it.
__device__ inline int sum_up_to_lane(int value) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, value, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) value += other;
  }
  return value;
}

// Replaces count[0] to count[size - 1] by the sums of those before them. All kThreads threads of
// the block call it, once a kernel; they see each other's sums behind the next __syncthreads().
template <int kThreads>
__device__ void add_up(int* count, int size) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kWarps <= 32, "a lane a warp");
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = (size + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * share, size);
  const int end = min(begin + share, size);
  int own = 0;
  for (int i = begin; i < end; ++i) own += count[i];
  const int in_warp = sum_up_to_lane(own);
  if (lane == 31) warp_sums[warp] = in_warp;
  __syncthreads();
  const int warps_before = sum_up_to_lane(lane < warp ? warp_sums[lane] : 0);
  int sum = __shfl_sync(0xffffffff, warps_before, 31) + in_warp - own;
  for (int i = begin; i < end; ++i) {
    const int next = sum + count[i];
    count[i] = sum;
    sum = next;
  }
}

}  // namespace hopper_attention
