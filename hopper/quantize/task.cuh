// A task: 128 tokens of one head of q, k or v, and how its elements lie over the threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "quantize/params.h"

namespace hopper_attention {

struct Task {
  int which;  // QuantizeWhich
  int head;
  int sequence;
  int slot;             // in the outputs; of the sequence where dense
  int first;            // token of the sequence
  int rows;             // tokens that exist, 0 to 128
  int seqlen;           // of the sequence
  std::int64_t memory;  // first's place along the sequence dimension in memory

  // The index of (sequence, head).
  __device__ std::int64_t group(const QuantizeTensor& tensor) const {
    return static_cast<std::int64_t>(sequence) * tensor.heads + head;
  }
  // The same for what packed tensors have only once for all sequences.
  __device__ std::int64_t dense_group(const QuantizeTensor& tensor) const {
    return tensor.cu_seqlens != nullptr ? head : group(tensor);
  }
};

// A thread holds 32 elements, as four vectors of 8 adjacent channels. In q and k the vectors are of
// one token, so that most of the Hadamard transform stays in the thread; in v they are of the four
// tokens that are neighbours in the transposed layout, so that four bytes make a word there.
template <int kHeadDimTile, class ElementType>
struct QuantizeShape {
  using Element = ElementType;
  static constexpr int kHeadDim = kHeadDimTile;
  static constexpr int kThreads = 4 * kHeadDim;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBlocksPerSm = 1024 / kThreads;  // 64 registers a thread
  static constexpr int kLanes = kHeadDim / 32;          // threads that share a row of q or k
  static constexpr int kStages = 2;

  struct Shared {
    uint4 stages[kStages][4][kThreads];  // the vectors, each in a place of its thread's
    std::uint32_t words[kHeadDim * 32];  // V transposed: (channel, 4 tokens); or the sums of K
    uint4 signs[kHeadDim / 8];           // to be xored with 8 elements
    float inverse[kHeadDim];             // V's scales
    std::uint32_t warp_amax[kStages][32];
    std::uint32_t row_amax[kQuantizeTokens];
    Task tasks[kStages][kWarps];  // a copy for each warp: registers are short
  };
};

// threadIdx.x, read anew at each place. What follows from it would otherwise be computed once
// before the loop over tasks and kept: the registers that takes are needed inside, and it would be
// spilled.
__device__ inline int thread_idx() {
  int idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}

// Thread to (row, lane in the row) of q and k; vector i is vector lane + kLanes * i of the row.
template <class Shape>
struct RowPlace {
  int thread = thread_idx();
  int row = thread / Shape::kLanes;
  int lane = thread % Shape::kLanes;
  __device__ int vector(int i) const { return lane + Shape::kLanes * i; }
};

// Thread to (8 channels, 4 tokens) of v: a warp covers 64 channels and 16 tokens.
template <class Shape>
struct ColumnPlace {
  static constexpr int kAcross = Shape::kHeadDim / 64;
  int thread = thread_idx();
  int vector = thread / 32 % kAcross * 8 + thread % 8;  // of 8 channels
  int group = thread / 32 / kAcross;                    // of 16 tokens
  int quad = thread % 32 / 8;                           // of 4 of them
  __device__ int row(int i) const { return 16 * group + key_of_slot(4 * quad + i); }
};

// The packed sequence that a slot belongs to: the last that begins at or before it.
__device__ inline void locate_packed(const QuantizeTensor& tensor, Task& task) {
  int low = 0, high = tensor.batch - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_slot(__ldg(tensor.cu_seqlens + middle), middle) <= task.slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  // Whatever cu_seqlens holds, no token outside the tensor is touched.
  const int begin = min(max(__ldg(tensor.cu_seqlens + low), 0), tensor.seqlen);
  const int end = min(max(__ldg(tensor.cu_seqlens + low + 1), begin), tensor.seqlen);
  const std::int64_t block = task.slot - first_slot(begin, low);
  task.sequence = low;
  task.seqlen = end - begin;
  task.first = static_cast<int>(
      min(max(block, std::int64_t{0}) * kQuantizeTokens, static_cast<std::int64_t>(task.seqlen)));
  task.memory = static_cast<std::int64_t>(begin) + task.first;
}

// Heads go fastest, so that blocks that run together read neighbouring memory.
__device__ inline Task make_task(const QuantizeParams& params, int index, bool v_backwards) {
  Task task;
  task.which = 0;
  while (index >= params.tensors[task.which].num_tasks) {
    index -= params.tensors[task.which++].num_tasks;
  }
  const QuantizeTensor& tensor = params.tensors[task.which];
  if (v_backwards && task.which == kV) index = tensor.num_tasks - 1 - index;
  const int block = tensor.by_heads.quotient(index);
  task.head = index - block * tensor.heads;
  task.sequence = tensor.by_slots.quotient(block);
  task.slot = block - task.sequence * tensor.by_slots.divisor;
  if (tensor.cu_seqlens != nullptr) {
    locate_packed(tensor, task);
  } else {
    task.seqlen = tensor.seqlen;
    task.first = task.slot * kQuantizeTokens;
    task.memory = task.first;
  }
  task.rows = min(task.seqlen - task.first, kQuantizeTokens);
  return task;
}

}  // namespace hopper_attention
