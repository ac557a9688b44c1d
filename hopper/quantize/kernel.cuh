// The quantizer's kernels. Blocks stay on their multiprocessor and take one task after the other,
// with the loads of the next one under way.
#pragma once

#include "quantize/columns.cuh"
#include "quantize/rows.cuh"

namespace hopper_attention {

enum class QuantizePass { kStats, kQuantize };

// The signs of 8 channels, to be xored with their 16-bit values.
__device__ inline uint4 sign_mask(std::uint32_t byte) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const std::uint32_t pair = byte >> (2 * w);
    words[w] = (pair & 1) << 15 | (pair >> 1 & 1) << 31;
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class Shape, QuantizePass kPass>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    quantize_kernel(const __grid_constant__ QuantizeParams params) {
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_memory);
  constexpr bool kBackwards = kPass == QuantizePass::kQuantize;

  const auto start = [&](int index, int stage) {
    if (index < params.num_tasks) {
      const Task task = make_task(params, index, kBackwards);
      if (const int thread = thread_idx(); thread % 32 == 0) {
        shared.tasks[stage][thread / 32] = task;
      }
      start_loads<Shape>(params, task, shared.stages[stage]);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int n = 0; n < Shape::kStages; ++n) start(blockIdx.x + n * gridDim.x, n);
  if (const int vector = threadIdx.x; vector < Shape::kHeadDim / 8) {
    shared.signs[vector] = sign_mask(params.sign_bits[vector / 4] >> (8 * (vector % 4)) & 0xff);
  }
  __syncthreads();

  int stage = 0;
  for (int index = blockIdx.x; index < params.num_tasks; index += gridDim.x) {
    asm volatile("cp.async.wait_group %0;" ::"n"(Shape::kStages - 1) : "memory");
    __syncwarp();  // rotary embedding reads the vectors of other threads of the warp
    const Task& task = shared.tasks[stage][thread_idx() / 32];
    float x[4][8];
    if (task.which == kV) {
      if constexpr (kPass == QuantizePass::kStats) {
        load_columns<Shape>(shared.stages[stage], x);
        measure_columns<Shape>(params, task, x);
      } else {
        quantize_columns<Shape>(params, task, shared, stage, x);
      }
    } else {
      load_rows<Shape>(params, task, shared.stages[stage], shared.signs, x);
      if constexpr (kPass == QuantizePass::kStats) {
        measure_rows<Shape>(params, task, shared, x);
      } else {
        quantize_rows<Shape>(params, task, shared, stage, x);
      }
    }
    __syncwarp();  // all have read before anything new arrives
    start(index + Shape::kStages * gridDim.x, stage);
    stage = (stage + 1) % Shape::kStages;
  }
}

constexpr int kMeanWays = 32;  // sums that run side by side

// K's mean over a sequence: thread (channel, way) adds the sums of blocks way, way + 32, ...; then
// the ways are added in pairs, pairs of pairs and so on. Grid (sequence * heads, channels / 32).
__global__ void __launch_bounds__(32 * kMeanWays)
    quantize_mean_kernel(const __grid_constant__ QuantizeParams params) {
  __shared__ float sums[kMeanWays][32];
  const QuantizeTensor& k = params.tensors[kK];
  const int head = blockIdx.x % k.heads, sequence = blockIdx.x / k.heads;
  const int channel = blockIdx.y * 32 + threadIdx.x, way = threadIdx.y;
  std::int64_t slot = 0, seqlen = k.seqlen, group = blockIdx.x;
  if (k.cu_seqlens != nullptr) {
    const int begin = min(max(k.cu_seqlens[sequence], 0), k.seqlen);
    seqlen = min(max(k.cu_seqlens[sequence + 1], begin), k.seqlen) - begin;
    slot = first_slot(begin, sequence);
    group = head;
  }
  const std::int64_t blocks = (seqlen + kQuantizeTokens - 1) / kQuantizeTokens;
  float sum = 0.0f;
  if (channel < k.head_dim) {
    const float* from = params.k_partial + (group * k.slots + slot) * k.head_dim + channel;
    for (std::int64_t n = way; n < blocks; n += kMeanWays) sum += from[n * k.head_dim];
  }
  sums[way][threadIdx.x] = sum;
  for (int step = 1; step < kMeanWays; step *= 2) {
    __syncthreads();
    if (way % (2 * step) == 0) sums[way][threadIdx.x] += sums[way + step][threadIdx.x];
  }
  if (way == 0 && channel < k.head_dim) {
    const float mean = seqlen > 0 ? sums[0][threadIdx.x] / static_cast<float>(seqlen) : 0.0f;
    // Where the sum overflows, K stays as it is.
    params.k_mean[static_cast<std::int64_t>(blockIdx.x) * k.head_dim + channel] =
        fabsf(mean) < INFINITY ? mean : 0.0f;
  }
}

}  // namespace hopper_attention
