// The quantizer's kernel: all passes over q, k and v in one launch. Blocks stay on their
// multiprocessor and draw one task after the other.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "quantize/columns.cuh"
#include "quantize/measure.cuh"
#include "quantize/mixed.cuh"
#include "quantize/service.cuh"

namespace hopper_attention {

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

template <class Shape>
__device__ void initialize(const QuantizeParams& params, typename Shape::Shared& shared) {
  const int thread = threadIdx.x;
  if (thread == 0) {
    shared.zero = 0;
    for (OutLeft& left : shared.left) left = OutLeft::kNothing;
    for (auto& barrier : shared.stage_full) barrier.init(1);
    for (auto& barrier : shared.stage_empty) barrier.init(Shape::kTeamWarps);
    for (int slot = 0; slot < Shape::kSlots; ++slot) {
      shared.task_full[slot].init(1);
      shared.given_full[slot].init(1);
      shared.result_full[slot].init(Shape::kTeamWarps);
      shared.task_empty[slot].init(2);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (thread < Shape::kVectors) {
    const uint4 signs = sign_mask(params.sign_bits[thread / 4] >> (8 * (thread % 4)) & 0xff);
    shared.signs[thread] = signs;
    auto* words = reinterpret_cast<std::uint32_t*>(shared.signs_of_lanes + thread / 4 * 4);
    words += thread % 4;
    words[0] = signs.x, words[4] = signs.y, words[8] = signs.z, words[12] = signs.w;
  }
  __syncthreads();
}

// Waits for the n-th task's tile.
template <class Shape>
__device__ void wait_for_tile(typename Shape::Shared& shared, int n) {
  const int stage = n % Shape::kStages, phase = n / Shape::kStages & 1;
  constexpr bool kShared = quantize_geometry(Shape::kHeadDim).shares_stages();
  if constexpr (kShared) shared.stage_empty[stage].wait(phase ^ 1);
  shared.stage_full[stage].wait(phase);
}

// Measures the tile of the n-th task or writes it.
template <class Shape>
__device__ void take(const QuantizeParams& params, const QuantizeMaps& maps,
                     typename Shape::Shared& shared, int n) {
  const Task& task = shared.slot(n).task;
  const QuantizeTensor& tensor = params.tensors[task.which];
  wait_for_tile<Shape>(shared, n);
  if (!tensor.aligned) load_unaligned<Shape>(tensor, task, shared.stage(n));
  if (task.given_scale(tensor) || task.subtracts_mean(params)) {
    shared.given_full[n % Shape::kSlots].wait(n / Shape::kSlots & 1);
  }
  if (task.pass == QuantizePass::kAmax && !task.transforms(params)) {
    measure_amax<Shape>(tensor, shared.slot(n), shared.stage(n));
    shared.release_stage(n);
  } else if (task.pass == QuantizePass::kQuantize && task.which == kV && params.v_transposed) {
    take_columns<Shape>(params, shared, n);
  } else if (Shape::kMixes && task.which != kV) {
    if constexpr (Shape::kMixes) take_mixed<Shape>(params, maps, shared, n);
  } else {
    take_rows<Shape>(params, maps, shared, n);
  }
}

template <class Shape>
__device__ void work(const QuantizeParams& params, const QuantizeMaps& maps,
                     typename Shape::Shared& shared) {
  for (int n = team_idx<Shape>();; n += Shape::kTeams) {
    shared.task_full[n % Shape::kSlots].wait(n / Shape::kSlots & 1);
    if (shared.slot(n).task.none()) break;
    take<Shape>(params, maps, shared, n);
    __syncwarp();
    arrive_warp(shared.result_full[shared.template at<Shape::kSlots>(n)]);
  }
  if (thread_idx() % 32 == 0) cute::tma_store_wait<0>();  // shared memory is still being read
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    quantize_kernel(const __grid_constant__ QuantizeParams params,
                    const __grid_constant__ QuantizeMaps maps) {
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_memory);
  initialize<Shape>(params, shared);
  if (threadIdx.x < Shape::kWorkers) {
    if constexpr (Shape::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Shape::kWorkersRegisters>();
    }
    work<Shape>(params, maps, shared);
    return;
  }
  if constexpr (Shape::kMovesRegisters) {
    cutlass::arch::warpgroup_reg_dealloc<Shape::kServiceRegisters>();
  }
  const int warp = (threadIdx.x - Shape::kWorkers) / 32;
  if (warp == 0) {
    if (threadIdx.x % 32 < Shape::kTeams) load_tiles<Shape>(params, maps, shared);
  } else if (warp == 1) {
    fetch<Shape>(params, shared);
  } else if (warp == 2) {
    publish<Shape>(params, shared);
  }
}

}  // namespace hopper_attention
