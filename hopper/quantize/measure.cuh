// Largest magnitudes of elements as they came. Passes that do no more have 8 channels of 8 rows a
// thread. The last pass over v looks for those of tokens.
#pragma once

#include "quantize/load.cuh"
#include "quantize/transform.cuh"

namespace hopper_attention {

// Pairs of 16-bit numbers without their signs are ordered as their bits are.
__device__ inline uint4 magnitudes(const uint4& v) {
  return {v.x & 0x7fff7fffu, v.y & 0x7fff7fffu, v.z & 0x7fff7fffu, v.w & 0x7fff7fffu};
}

__device__ inline uint4 max_halves(const uint4& a, const uint4& b) {
  return {__vmaxu2(a.x, b.x), __vmaxu2(a.y, b.y), __vmaxu2(a.z, b.z), __vmaxu2(a.w, b.w)};
}

template <class Element>
constexpr std::uint32_t kLargestHalves = 0x7bff7bffu;  // the largest finite number, twice
template <>
constexpr std::uint32_t kLargestHalves<__nv_bfloat16> = 0x7f7f7f7fu;

// With infinities and NaN replaced by 0.
template <class Element>
__device__ uint4 finite_magnitudes(const uint4& vector) {
  const uint4 v = magnitudes(vector);
  constexpr std::uint32_t kLargest = kLargestHalves<Element>;
  return {v.x & __vcmpleu2(v.x, kLargest), v.y & __vcmpleu2(v.y, kLargest),
          v.z & __vcmpleu2(v.z, kLargest), v.w & __vcmpleu2(v.w, kLargest)};
}

__device__ inline std::uint32_t max_word(const uint4& v) {
  return __vmaxu2(__vmaxu2(v.x, v.y), __vmaxu2(v.z, v.w));
}

template <class Element>
__device__ float largest_half(const uint4& v) {
  const std::uint32_t pair = max_word(v);
  float low, high;
  unpack(pair, low, high, Element{});
  return fmaxf(low, high);
}

// This thread's vectors, all of which are under way before the first is used; rows of others are 0.
template <class Shape>
__device__ void load_own_rows(const Task& task, const uint4* stage, uint4 (&vectors)[8]) {
  const MeasurePlace<Shape> place;
  const uint4* from = stage + vector_place(place.first_row, place.vector);
#pragma unroll
  for (int i = 0; i < 8; ++i) vectors[i] = from[16 * 8 * i];
  if (task.rows >= kQuantizeTokens) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (place.first_row + 16 * i >= task.rows) vectors[i] = {};
  }
}

// Largest |x| of this thread's channels over its rows.
template <class Shape, bool kFinite>
__device__ uint4 largest_of_rows(const Task& task, const uint4* stage) {
  uint4 vectors[8];
  load_own_rows<Shape>(task, stage, vectors);
  uint4 largest = {};
#pragma unroll
  for (const uint4& vector : vectors) {
    largest = max_halves(
        largest, kFinite ? finite_magnitudes<typename Shape::Element>(vector) : magnitudes(vector));
  }
  return largest;
}

__device__ inline std::uint32_t max_of_other(std::uint32_t own, std::uint32_t sent, int step) {
  return __vmaxu2(own, __shfl_xor_sync(kAllLanes, sent, step));
}

// Over the 16 lanes that share a vector: as they halve, so do the words that a lane keeps. Lane
// 4 w of the 16 ends with word w, two channels.
__device__ inline std::uint32_t largest_of_lanes(const uint4& v) {
  const int lane = thread_idx() % 32;
  const bool high = (lane & 8) != 0, odd = (lane & 4) != 0;
  const std::uint32_t first = max_of_other(high ? v.z : v.x, high ? v.x : v.z, 8);
  const std::uint32_t second = max_of_other(high ? v.w : v.y, high ? v.y : v.w, 8);
  std::uint32_t word = max_of_other(odd ? second : first, odd ? first : second, 4);
  word = max_of_other(word, word, 2);
  return max_of_other(word, word, 1);
}

// Largest magnitudes without a transform, in 16 bits.
template <class Shape>
__device__ void measure_amax(const QuantizeTensor& tensor, typename Shape::Slot& slot,
                             const uint4* stage) {
  using Element = typename Shape::Element;
  const MeasurePlace<Shape> place;
  uint4 largest = largest_of_rows<Shape, false>(slot.task, stage);
  if (__vmaxu2(max_word(largest), kLargestHalves<Element>) != kLargestHalves<Element>) {
    slot.infinite = 1;
    largest = largest_of_rows<Shape, true>(slot.task, stage);
  }
  __syncwarp();
  if (tensor.scale != ScaleKind::kChannel) {
    const std::uint32_t bits = warp_largest(largest_half<Element>(largest));
    if (place.thread % 32 == 0) slot.result[place.thread / 32] = __uint_as_float(bits);
    return;
  }
  // Raised here, by all warps: the publishing warp only counts the tile.
  const std::uint32_t word = largest_of_lanes(largest);
  float low, high;
  unpack(word, low, high, Element{});
  const int odd = place.first_row % 4, channel = 8 * place.vector + place.first_row / 4 * 2 + odd;
  if (odd < 2 && channel < tensor.head_dim) {
    const float of_channel = odd == 0 ? low : high;
    std::uint32_t* to = tensor.amax + slot.task.group(tensor) * tensor.head_dim + channel;
    if (of_channel > 0.0f) atomicMax(to, __float_as_uint(of_channel));
  }
}

// Largest |x| of this thread's 64 channels of a row.
template <class Shape, bool kFinite>
__device__ uint4 largest_of_row(const uint4* stage) {
  const RowPlace<Shape> place;
  const int first = vector_place(place.row, place.vector(0));
  uint4 largest = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 vector = stage[first ^ i];
    largest = max_halves(
        largest, kFinite ? finite_magnitudes<typename Shape::Element>(vector) : magnitudes(vector));
  }
  return largest;
}

// What this thread's token of v is multiplied by. Its largest |x| is left where its factor will be,
// see finish_factors, and the warp's in the task's result. infinite: whether the thread's channels
// have anything that is not finite.
template <class Shape>
__device__ float find_token_scale(const QuantizeParams& params, typename Shape::Slot& slot,
                                  const uint4* stage, bool* infinite) {
  using Element = typename Shape::Element;
  const Task& task = slot.task;
  const QuantizeTensor& v = params.tensors[kV];
  const RowPlace<Shape> place;
  const bool exists = place.row < task.rows;
  uint4 largest = largest_of_row<Shape, false>(stage);
  constexpr std::uint32_t kLargest = kLargestHalves<Element>;
  *infinite = exists && __vmaxu2(max_word(largest), kLargest) != kLargest;
  if (*infinite) largest = largest_of_row<Shape, true>(stage);
  __syncwarp();
  const float amax = row_largest<Shape>(exists ? largest_half<Element>(largest) : 0.0f);
  if (place.part == 0 && exists) {
    params.v_token_factor[task.dense_group(v) * v.seqlen + task.memory + place.row] = amax;
  }
  const std::uint32_t of_warp = warp_largest(amax);
  if (place.thread % 32 == 0) slot.result[place.warp] = __uint_as_float(of_warp);
  return inverse_of(amax);
}

}  // namespace hopper_attention
