// A task: one pass over a tile, 128 tokens of one head of q, k or v; and what a block of threads
// keeps in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/barriers.cuh"
#include "quantize/launch.h"

namespace hopper_attention {

extern __shared__ __align__(1024) uint4 shared_memory[];

// A 0 that the compiler does not know, at the begin of shared memory. What is computed from a
// number plus this 0 is computed where it is needed. Otherwise it would be computed once before all
// uses and kept: the registers that takes are needed in between, and it would be spilled.
__device__ inline int unknown_zero() {
  int zero;
  asm volatile("ld.volatile.shared.b32 %0, [%1];"
               : "=r"(zero)
               : "r"(cute::cast_smem_ptr_to_uint(shared_memory)));
  return zero;
}

__device__ inline unsigned thread_idx() { return threadIdx.x + unknown_zero(); }

struct Task {
  QuantizePass pass;
  int which;  // QuantizeWhich; below 0: there are no more
  int head;
  int sequence;
  int slot;    // in the outputs; of the sequence where dense
  int first;   // token of the sequence
  int rows;    // tokens that exist, 0 or less to 128
  int seqlen;  // of the sequence
  int memory;  // first's place along the sequence dimension in memory
  int kept;    // in L2, for a later pass
  int asks;    // it must know something that others find

  __device__ bool none() const { return which < 0; }
  // The index of (sequence, head).
  __device__ std::int64_t group(const QuantizeTensor& tensor) const {
    return static_cast<std::int64_t>(sequence) * tensor.heads + head;
  }
  // The same for what packed tensors have only once for all sequences.
  __device__ std::int64_t dense_group(const QuantizeTensor& tensor) const {
    return tensor.cu_seqlens != nullptr ? head : group(tensor);
  }
  __device__ bool subtracts_mean(const QuantizeParams& params) const {
    return which == kK && params.smooth_k;
  }
  __device__ bool transforms(const QuantizeParams& params) const {
    const bool rotates = params.hadamard_log2 > 0 || params.rotary.dim > 0;
    return (which != kV && rotates) || subtracts_mean(params);
  }
  // The last pass over v finds the largest |x| of its heads, which its tokens' factors refer to.
  __device__ bool measures_head(const QuantizeParams& params) const {
    return which == kV && params.tensors[kV].scale == ScaleKind::kToken;
  }
  // K's tiles, which come later, divide by it.
  __device__ bool finishes_factors(const QuantizeParams& params) const {
    return which == kK && pass == QuantizePass::kQuantize &&
           params.tensors[kV].scale == ScaleKind::kToken;
  }
  // The largest |x| of what shares a scale is known.
  __device__ bool given_scale(const QuantizeTensor& tensor) const {
    return pass == QuantizePass::kQuantize && tensor.find_amax;
  }
};

// What may still be read where a team writes its next tile: rows, by TMA, a warp's at a time, or
// channels, by all of the team.
enum class OutLeft : std::int8_t { kNothing, kRows, kColumns };

// Threads work in teams, each on a tile of its own, 64 elements a thread. Three warps serve them:
// one draws tickets and loads, one fetches scales, one publishes what was measured.
//
// kMixed: q's and k's Walsh-Hadamard transform begins in the tensor cores; nothing comes before it.
template <int kHeadDimTile, class ElementType, bool kMixed>
struct QuantizeShape {
  using Element = ElementType;
  static constexpr int kHeadDim = kHeadDimTile;
  static constexpr bool kMixes = kMixed;
  static constexpr int kVectors = kHeadDim / 8;  // of 8 channels, 16 bytes, in a row
  static constexpr int kParts = kHeadDim / 64;   // 64 channels of all rows are a slab of TMA's
  static constexpr int kTeamThreads = 2 * kHeadDim;
  static constexpr int kTeamWarps = kTeamThreads / 32;
  static constexpr int kTeams = quantize_geometry(kHeadDim).teams;
  static constexpr int kWorkers = kTeams * kTeamThreads;
  static constexpr int kThreads = kWorkers + 128;  // the serving warps, and one that leaves
  static constexpr int kBlocksPerSm = quantize_geometry(kHeadDim).blocks_per_sm;
  // Two blocks' 24 warps have 80 registers a thread; of a block's, workers take over 16.
  static constexpr bool kMovesRegisters = kBlocksPerSm == 2;
  static constexpr int kWorkersRegisters = 96, kServiceRegisters = 48;
  static constexpr int kWarpRows = quantize_geometry(kHeadDim).rows_of_warp;
  static constexpr int kStages = quantize_geometry(kHeadDim).stages;
  static constexpr int kSlots = kHeadDim == 64 ? 8 : 4;  // tasks in work, more than stages

  // A task, and what is found out for it and by it.
  struct Slot {
    Task task;
    float inverse;                       // of a given scale that channels share
    int given_infinite;                  // the given scale's tiles have an infinity
    int infinite;                        // this one has
    alignas(16) float values[kHeadDim];  // V: inverse scales of channels; K: its mean; as float4
    float result[kTeamWarps];            // largest |x| of warps
  };

  struct Shared {
    int zero;  // unknown_zero()
    FullBarrier stage_full[kStages];
    EmptyBarrier stage_empty[kStages];
    EmptyBarrier task_full[kSlots];    // the task is there
    EmptyBarrier given_full[kSlots];   // its given scales or mean are
    EmptyBarrier result_full[kSlots];  // the workers are done
    EmptyBarrier task_empty[kSlots];   // so are both serving warps
    alignas(1024) uint4 stages[kStages][kParts * kQuantizeTokens * 8];
    alignas(1024) uint4 out[kTeams][kHeadDim * 8];
    uint4 signs[kVectors];           // to be xored with 8 elements
    uint4 signs_of_lanes[kVectors];  // with a lane's elements of 4 vectors: (4 vectors, lane % 4)
    Slot slots[kSlots];
    float token_inverse[kTeams][kQuantizeTokens];
    OutLeft left[kWorkers / 32];  // each warp's own: what the last tile that it wrote left in `out`

    template <unsigned kCount>
    static __device__ unsigned at(int n) {
      return static_cast<unsigned>(n + unknown_zero()) % kCount;
    }
    // What belongs to a block's n-th task.
    __device__ Slot& slot(int n) { return slots[at<kSlots>(n)]; }
    __device__ uint4* stage(int n) { return stages[at<kStages>(n)]; }
    // Called by every warp of the team when it has read the tile.
    __device__ void release_stage(int n) {
      __syncwarp();
      arrive_warp(stage_empty[at<kStages>(n)]);
    }
  };
};

template <class Shape>
__device__ int team_thread() {
  return thread_idx() % Shape::kTeamThreads;
}

template <class Shape>
__device__ int team_idx() {
  return Shape::kTeams == 1 ? 0 : thread_idx() / Shape::kTeamThreads;
}

template <class Shape>
__device__ void sync_team() {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + team_idx<Shape>()), "n"(Shape::kTeamThreads)
               : "memory");
}

// Whether any thread of the team says so; waits for all.
template <class Shape>
__device__ bool team_any(bool mine) {
  int any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "bar.red.or.pred q, %2, %3, p;\n"
      "selp.b32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<int>(mine)), "r"(1 + team_idx<Shape>()), "n"(Shape::kTeamThreads)
      : "memory");
  return any != 0;
}

// Where a vector of a row lies in a stage: TMA swizzles the eight of a slab's row.
__device__ inline int vector_place(int row, int vector) {
  return vector / 8 * kQuantizeTokens * 8 + row * 8 + (vector ^ row) % 8;
}

// Thread to (row, 64 channels), with vectors 8 * part to 8 * part + 7. Eight threads that follow
// each other have eight rows: their vectors lie in different banks.
template <class Shape>
struct RowPlace {
  int thread = team_thread<Shape>();
  int warp = thread / 32;
  int part = thread % 32 / Shape::kWarpRows;
  int warp_row = thread % Shape::kWarpRows;
  int row = warp * Shape::kWarpRows + warp_row;
  __device__ int vector(int i) const { return 8 * part + i; }
};

// Thread to (8 channels, 4 tokens) of v, twice: a warp covers 64 channels and 16 tokens.
template <class Shape>
struct ColumnPlace {
  int thread = team_thread<Shape>();
  int vector = thread / 32 % Shape::kParts * 8 + thread % 8;  // of 8 channels
  int quad = thread % 32 / 8;                                 // of 4 tokens
  // Of 16 tokens. 128 tokens are 8 groups, and 4 go at a time.
  __device__ int group(int turn) const { return thread / 32 / Shape::kParts + 4 * turn; }
  __device__ int row(int turn, int i) const { return 16 * group(turn) + key_of_slot(4 * quad + i); }
};

// Thread to (8 channels, rows first_row + 16 i).
template <class Shape>
struct MeasurePlace {
  int thread = team_thread<Shape>();
  int vector = thread / 16;
  int first_row = thread % 16;
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
  task.memory = begin + task.first;
}

// A task's tokens, from its slot.
__device__ inline void locate(const QuantizeTensor& tensor, Task& task) {
  if (tensor.cu_seqlens != nullptr) {
    locate_packed(tensor, task);
  } else {
    task.seqlen = tensor.seqlen;
    task.memory = task.first = task.slot * kQuantizeTokens;
  }
  task.rows = min(task.seqlen - task.first, kQuantizeTokens);
}

__device__ inline Task make_task(const QuantizeParams& params, int ticket, int& segment) {
  Task task{};
  task.which = -1;
  if (ticket >= params.schedule.num_tickets) return task;
  const QuantizeSchedule::Drawn drawn = params.schedule(ticket, segment);
  const QuantizeStream& stream = params.schedule.streams[drawn.stream];
  const QuantizeTensor& tensor = params.tensors[stream.which];
  task.pass = stream.pass;
  task.which = stream.which;
  task.kept = drawn.kept;
  const HeadOrder::Tile tile = tensor.order(drawn.tile);
  task.head = tile.head;
  task.sequence = tile.sequence;
  task.slot = tile.slot;
  locate(tensor, task);
  task.asks =
      task.given_scale(tensor) || task.subtracts_mean(params) || task.finishes_factors(params);
  return task;
}

}  // namespace hopper_attention
