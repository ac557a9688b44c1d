// What blocks of threads tell each other about scales. A scale of a head or of a tensor needs no
// counter and no fence: what tiles found and how many they are is one word, which is there or not.
#pragma once

#include "quantize/task.cuh"

namespace hopper_attention {

// The bits of the largest finite |x|, and whether there is an infinity.
struct Found {
  static constexpr std::uint32_t kInfinite = 1u << 31;
  std::uint32_t word = 0;

  __device__ float amax() const { return __uint_as_float(word & ~kInfinite); }
  __device__ bool infinite() const { return (word & kInfinite) != 0; }
  __device__ Found with(Found other) const {
    return {max(word & ~kInfinite, other.word & ~kInfinite) | ((word | other.word) & kInfinite)};
  }
};

__device__ inline std::uint32_t load_acquire(const std::uint32_t* from) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline std::uint64_t load_relaxed(const std::uint64_t* from) {
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from));
  return value;
}

// Tiles, and what they found.
__device__ inline void store_found(std::uint64_t* to, std::uint32_t tiles, Found found) {
  const std::uint64_t word = static_cast<std::uint64_t>(tiles) << 32 | found.word;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

// Entries of `found` that share a scale. All of them count, and the maximum is that of some.
struct FoundRange {
  const std::uint64_t* entries;
  int count;
  std::uint32_t tiles;  // that they tell of when they are complete
  int begin, end;

  __device__ FoundRange(const QuantizeTensor& tensor, const Task& task) {
    begin = 0;
    if (tensor.scale == ScaleKind::kTensor) {  // an entry a block of threads
      entries = tensor.found;
      count = end = gridDim.x;
      tiles = tensor.order.num_tiles;
      return;
    }
    entries = tensor.found + task.dense_group(tensor) * tensor.slots;
    count = end = tensor.slots;
    tiles = tensor.slots;
    if (tensor.cu_seqlens == nullptr) return;
    // Of a packed sequence. Whatever cu_seqlens holds, all tiles of the head come, and nobody waits
    // forever.
    begin = static_cast<int>(first_slot(task.memory - task.first, task.sequence));
    end = begin + (task.seqlen + kQuantizeTokens - 1) / kQuantizeTokens;
  }

  // By a warp; whether they are complete.
  __device__ bool read(Found* found) const {
    constexpr int kAtOnce = 8;  // loads that are under way together
    std::uint32_t there = 0;
    Found mine;
    for (int first = thread_idx() % 32; first < count; first += 32 * kAtOnce) {
      std::uint64_t word[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + 32 * i;
        word[i] = at < count ? load_relaxed(entries + at) : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + 32 * i;
        there += static_cast<std::uint32_t>(word[i] >> 32);
        if (begin <= at && at < end) mine = mine.with({static_cast<std::uint32_t>(word[i])});
      }
    }
    __syncwarp();
    there = __reduce_add_sync(kAllLanes, there);
    const std::uint32_t largest = __reduce_max_sync(kAllLanes, mine.word & ~Found::kInfinite);
    const bool infinite = __any_sync(kAllLanes, mine.infinite());
    *found = {largest | (infinite ? Found::kInfinite : 0)};
    return there >= tiles;
  }
};

// What a block knows of others' scales; called by all of the warp that fetches them.
class KnownScales {
 public:
  Found given;  // the scale of the task that has_given was asked about last, of a head or a tensor

  // Whether all that a task must know is there.
  __device__ bool has_given(const QuantizeParams& params, const Task& task) {
    const QuantizeTensor& tensor = params.tensors[task.which];
    if (task.given_scale(tensor) && !has_scale(tensor, task)) return false;
    const QuantizeTensor& v = params.tensors[kV];
    return !task.finishes_factors(params) || has_all(v.measured, v, task, kV);
  }

 private:
  // A block's tasks come back to the same heads: a lane remembers one that is complete.
  __device__ bool recalls(std::int64_t key, Found* found) const {
    const int lane = static_cast<int>(key % 32);
    found->word = __shfl_sync(kAllLanes, found_.word, lane);
    return __shfl_sync(kAllLanes, key_, lane) == key;
  }
  __device__ void remember(std::int64_t key, Found found) {
    if (static_cast<int>(thread_idx() % 32) == static_cast<int>(key % 32)) {
      key_ = key;
      found_ = found;
    }
  }

  __device__ bool has_scale(const QuantizeTensor& tensor, const Task& task) {
    if (tensor.scale == ScaleKind::kChannel) {
      return has_all(tensor.measured, tensor, task, task.which);
    }
    const bool whole = tensor.scale == ScaleKind::kTensor;
    const std::int64_t key = 4 * (whole ? 0 : task.group(tensor)) + task.which;
    if (recalls(key, &given)) return true;
    if (!FoundRange(tensor, task).read(&given)) return false;
    remember(key, given);
    return true;
  }

  // Whether all tiles of a head are counted, those of packed sequences together.
  __device__ bool has_all(const std::uint32_t* counters, const QuantizeTensor& tensor,
                          const Task& task, int which) {
    const std::int64_t group = task.dense_group(tensor), key = 4 * group + which;
    Found none;
    if (recalls(key, &none)) return true;
    bool all = false;
    if (thread_idx() % 32 == 0) {
      all = load_acquire(counters + group) >= static_cast<std::uint32_t>(tensor.slots);
    }
    __syncwarp();
    all = __shfl_sync(kAllLanes, all, 0);
    if (all) remember(key, {});
    return all;
  }

  std::int64_t key_ = -1;
  Found found_;
};

// What a block tells others about scales of heads and tensors; called by all of the publishing
// warp.
class PublishedMaxima {
 public:
  // What a tile found, of a tensor whose heads have a scale each, or which has one.
  __device__ void publish(const QuantizeTensor& tensor, const Task& task, Found found) {
    const auto lane = static_cast<int>(thread_idx() % 32);
    if (tensor.scale == ScaleKind::kHead) {
      std::uint64_t* of_head = tensor.found + task.dense_group(tensor) * tensor.slots;
      if (lane == 0 && task.slot < tensor.slots) store_found(of_head + task.slot, 1, found);
    } else if (lane == task.which) {
      block_ = block_.with(found);
      store_found(tensor.found + blockIdx.x, ++tiles_, block_);
    }
  }

 private:
  // Of the tensor that this lane is the QuantizeWhich of, what this block's tiles found.
  std::uint32_t tiles_ = 0;
  Found block_;
};

}  // namespace hopper_attention
