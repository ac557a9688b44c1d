// The warps that serve the workers: one draws tickets and loads tiles, one fetches what a task must
// know first, and one publishes what it found. None keeps a worker waiting for memory.
#pragma once

#include "common/chain.h"
#include "quantize/found.cuh"
#include "quantize/load.cuh"
#include "quantize/transform.cuh"

namespace hopper_attention {

// A tile into a stage, slab by slab.
template <class Shape>
__device__ void load_tile(const QuantizeParams& params, const QuantizeMaps& maps, const Task& task,
                          uint4* stage, FullBarrier& full) {
  const QuantizeTensor& tensor = params.tensors[task.which];
  if (task.rows <= 0 || !tensor.aligned) {  // nothing, or the workers' own business
    full.arrive();
    return;
  }
  const auto hint =
      task.kept ? cute::TMA::CacheHintSm90::EVICT_LAST : cute::TMA::CacheHintSm90::EVICT_FIRST;
  full.arrive_and_expect_tx(kQuantizeTokens * Shape::kHeadDim * 2);
#pragma unroll
  for (int part = 0; part < Shape::kParts; ++part) {
    cute::SM90_TMA_LOAD_4D::copy(&maps.in[task.which], reinterpret_cast<std::uint64_t*>(&full),
                                 static_cast<std::uint64_t>(hint),
                                 stage + part * kQuantizeTokens * 8, 64 * part, task.memory,
                                 task.head, tensor.cu_seqlens != nullptr ? 0 : task.sequence);
  }
}

// A lane a team draws tickets until there are none, and tells its team so. Lanes draw together, and
// work out their tickets side by side: with two teams, tiles are half as large and tickets twice as
// many. The next tickets are drawn while these tiles are being loaded.
template <class Shape>
__device__ void load_tiles(const QuantizeParams& params, const QuantizeMaps& maps,
                           typename Shape::Shared& shared) {
  constexpr int kLanes = Shape::kTeams;
  constexpr unsigned kMask = (1u << kLanes) - 1;
  static_assert(Shape::kSlots % kLanes == 0);
  const int lane = threadIdx.x % 32;
  Ring<Shape::kSlots> ring;
  Ring<Shape::kStages> stage;
  for (int before = 0; before < lane; ++before) ring.advance(), stage.advance();
  int segment = 0;
  // What begins as zero and K's mean are there when the wait is over: the first tickets, which are
  // a block's by its number, need neither.
  int draws = 0;
  const auto draw = [&]() -> std::uint32_t {
    if (draws < params.first_draws) return (draws++ * gridDim.x + blockIdx.x) * kLanes;
    if (draws++ == params.first_draws) wait_for_last_kernel();
    return params.first_draws * gridDim.x * kLanes +
           atomicAdd(params.ticket, static_cast<std::uint32_t>(kLanes));
  };
  std::uint32_t drawn = lane == 0 ? draw() : 0;
  bool more = true, told = false;
  while (more) {
    if (!told) shared.task_empty[ring.stage].wait(ring.phase ^ 1);
    const auto first = static_cast<int>(__shfl_sync(kMask, drawn, 0));
    const int ticket = first + lane;
    const bool there = ticket < params.schedule.num_tickets;
    if (lane == 0 && there) drawn = draw();
    const Task task = make_task(params, ticket, segment);
    if (!told) {
      typename Shape::Slot& slot = shared.slots[ring.stage];
      slot.task = task;
      slot.infinite = 0;
      shared.task_full[ring.stage].arrive();
    }
    told = !there;
    more = first < params.schedule.num_tickets;
#pragma unroll 1
    for (int turn = 0; turn < kLanes; ++turn) {  // in the order in which stages become free
      __syncwarp(kMask);
      if (lane != turn || !there) continue;
      shared.stage_empty[stage.stage].wait(stage.phase ^ 1);
      load_tile<Shape>(params, maps, task, shared.stages[stage.stage],
                       shared.stage_full[stage.stage]);
    }
#pragma unroll
    for (int n = 0; n < kLanes; ++n) ring.advance(), stage.advance();
  }
}

// Adds 1 after all that this thread knows of has been written.
__device__ inline void announce(std::uint32_t* to) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(to) : "memory");
}

// Scales of channels: all loads are under way before the first is waited for.
template <class Shape>
__device__ void fetch_channels(const QuantizeTensor& tensor, const Task& task, float* inverses) {
  const int lane = thread_idx() % 32;
  const std::int64_t first = task.group(tensor) * tensor.head_dim;
  std::uint32_t amax[Shape::kHeadDim / 32];
#pragma unroll
  for (int i = 0; i < Shape::kHeadDim / 32; ++i) {
    const int c = lane + 32 * i;
    amax[i] = c < tensor.head_dim ? __ldcg(tensor.amax + first + c) : 0;
  }
#pragma unroll
  for (int i = 0; i < Shape::kHeadDim / 32; ++i) {
    const int c = lane + 32 * i;
    const float value = __uint_as_float(amax[i]);
    inverses[c] = inverse_of(value);
    if (c < tensor.head_dim && task.first == 0) tensor.descale[first + c] = descale_of(value);
  }
}

template <class Shape>
__device__ void fetch_mean(const QuantizeParams& params, const Task& task, float* mean) {
  const int lane = thread_idx() % 32, head_dim = params.tensors[kK].head_dim;
  const float* from = params.k_mean + task.group(params.tensors[kK]) * head_dim;
  float value[Shape::kHeadDim / 32];
#pragma unroll
  for (int i = 0; i < Shape::kHeadDim / 32; ++i) {
    const int c = lane + 32 * i;
    value[i] = c < head_dim ? __ldcg(from + c) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < Shape::kHeadDim / 32; ++i) mean[lane + 32 * i] = value[i];
}

// v_token_factor of the tokens that a tile of k has, where v's tiles left the largest |x|.
__device__ inline void finish_factors(const QuantizeParams& params, const Task& task) {
  const QuantizeTensor& v = params.tensors[kV];
  const int lane = thread_idx() % 32;
  float* factor = params.v_token_factor + task.dense_group(v) * v.seqlen + task.memory;
  float amax[kQuantizeTokens / 32];
#pragma unroll
  for (int i = 0; i < kQuantizeTokens / 32; ++i) {
    const int row = lane + 32 * i;
    amax[i] = row < task.rows ? __ldcg(factor + row) : 0.0f;
  }
  const float of_head = descale_of(__uint_as_float(__ldcg(v.amax + task.group(v))));
  if (lane == 0 && task.first == 0) v.descale[task.group(v)] = of_head;
#pragma unroll
  for (int i = 0; i < kQuantizeTokens / 32; ++i) {
    const int row = lane + 32 * i;
    if (row < task.rows) factor[row] = token_factor(amax[i], of_head);
  }
}

// Brings what a task must know to shared memory; the first task of a sequence writes its scale.
template <class Shape>
__device__ void fetch_given(const QuantizeParams& params, Found scale, typename Shape::Slot& slot) {
  const Task task = slot.task;
  const QuantizeTensor& tensor = params.tensors[task.which];
  const int lane = thread_idx() % 32;
  if (task.given_scale(tensor)) {
    if (tensor.scale == ScaleKind::kChannel) {
      const std::uint32_t infinite = __ldcg(tensor.infinite + task.group(tensor));
      fetch_channels<Shape>(tensor, task, slot.values);
      if (lane == 0) slot.given_infinite = static_cast<int>(infinite);
    } else if (lane == 0) {
      slot.inverse = inverse_of(scale.amax());
      slot.given_infinite = scale.infinite();
      if (task.first == 0) tensor.descale[task.group(tensor)] = descale_of(scale.amax());
    }
  }
  if (task.subtracts_mean(params)) fetch_mean<Shape>(params, task, slot.values);
  if (task.finishes_factors(params)) finish_factors(params, task);
}

// Tells other blocks what a tile has, and that it has been measured.
template <class Shape>
__device__ void publish_amax(const QuantizeParams& params, const typename Shape::Slot& slot,
                             PublishedMaxima& maxima) {
  const Task& task = slot.task;
  const QuantizeTensor& tensor = params.tensors[task.which];
  const int lane = thread_idx() % 32;
  std::uint32_t bits = 0;
  if (tensor.scale != ScaleKind::kChannel) {
    bits = __float_as_uint(slot.result[lane % Shape::kTeamWarps]);
    bits = __reduce_max_sync(kAllLanes, bits);
    if (tensor.find_amax) {
      maxima.publish(tensor, task, Found{bits | (slot.infinite ? Found::kInfinite : 0)});
      return;
    }
  }
  if (lane != 0) return;
  if (bits > 0) atomicMax(tensor.amax + task.group(tensor), bits);
  if (slot.infinite) atomicOr(tensor.infinite + task.group(tensor), 1u);
  announce(tensor.measured + task.dense_group(tensor));
}

// Tiles of a v whose tokens have scales, to be counted. Nobody waits for them soon, so that several
// may go behind one fence, which waits for all that the block's writes need.
class UncountedTiles {
 public:
  template <class Shape>
  __device__ void add(const QuantizeTensor& v, const typename Shape::Slot& slot) {
    const auto lane = static_cast<int>(thread_idx() % 32);
    const std::uint32_t of_warp = __float_as_uint(slot.result[lane % Shape::kTeamWarps]);
    const std::uint32_t bits = __reduce_max_sync(kAllLanes, of_warp);
    if (lane == tiles_) {
      group_ = static_cast<int>(slot.task.group(v));
      counter_ = static_cast<int>(slot.task.dense_group(v));
      bits_ = bits;
    }
    if (++tiles_ == kMost) count(v);
  }

  __device__ void count(const QuantizeTensor& v) {
    if (static_cast<int>(thread_idx() % 32) < tiles_) {
      if (bits_ > 0) atomicMax(v.amax + group_, bits_);
      announce(v.measured + counter_);
    }
    __syncwarp();
    tiles_ = 0;
  }

 private:
  static constexpr int kMost = 4;
  int tiles_ = 0;
  // Of this lane's tile.
  int group_ = 0, counter_ = 0;
  std::uint32_t bits_ = 0;
};

// A warp ahead of the workers: brings what a task must know as soon as others have found it.
template <class Shape>
__device__ void fetch(const QuantizeParams& params, typename Shape::Shared& shared) {
  KnownScales known;
  for (Ring<Shape::kSlots> ring;; ring.advance()) {
    shared.task_full[ring.stage].wait(ring.phase);
    typename Shape::Slot& slot = shared.slots[ring.stage];
    if (slot.task.none()) break;
    if (slot.task.asks) {
      while (!known.has_given(params, slot.task)) __nanosleep(50);
      fetch_given<Shape>(params, known.given, slot);
      __syncwarp();
    }
    arrive_warp(shared.given_full[ring.stage]);
    arrive_warp(shared.task_empty[ring.stage]);
  }
}

// A warp behind them: tells other blocks what tiles have. It waits for nobody else's tiles, since
// what those wait for may be its own to publish.
template <class Shape>
__device__ void publish(const QuantizeParams& params, typename Shape::Shared& shared) {
  PublishedMaxima maxima;
  UncountedTiles uncounted;
  bool cleared = false;  // the workspace, before this kernel
  const QuantizeTensor& v = params.tensors[kV];
  for (Ring<Shape::kSlots> ring;; ring.advance()) {
    shared.task_full[ring.stage].wait(ring.phase);
    const typename Shape::Slot& slot = shared.slots[ring.stage];
    // Other tasks may wait for these tiles.
    const bool measures_head = !slot.task.none() && slot.task.measures_head(params);
    if (!measures_head) uncounted.count(v);
    if (slot.task.none()) break;
    shared.result_full[ring.stage].wait(ring.phase);
    if (measures_head) {
      uncounted.add<Shape>(v, slot);
    } else if (slot.task.pass == QuantizePass::kAmax) {
      if (!cleared) wait_for_last_kernel();  // the first tasks did not
      cleared = true;
      publish_amax<Shape>(params, slot, maxima);
    }
    __syncwarp();
    arrive_warp(shared.task_empty[ring.stage]);
  }
}

}  // namespace hopper_attention
