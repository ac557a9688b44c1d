// The passes that only look at the elements as they came: largest magnitudes and K's sums. A thread
// has 8 channels of 8 rows.
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

// Largest |x| of this thread's channels over its rows.
template <class Shape, bool kFinite>
__device__ uint4 largest_of_rows(const Task& task, const uint4* stage) {
  const MeasurePlace<Shape> place;
  uint4 largest = {};
#pragma unroll
  for (int i = 0; i < kQuantizeTokens / 16; ++i) {
    const int row = place.first_row + 16 * i;
    if (row >= task.rows) continue;
    const uint4 vector = stage[vector_place(row, place.vector)];
    largest = max_halves(
        largest, kFinite ? finite_magnitudes<typename Shape::Element>(vector) : magnitudes(vector));
  }
  return largest;
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
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
    uint4 other;
    other.x = __shfl_xor_sync(kAllLanes, largest.x, step);
    other.y = __shfl_xor_sync(kAllLanes, largest.y, step);
    other.z = __shfl_xor_sync(kAllLanes, largest.z, step);
    other.w = __shfl_xor_sync(kAllLanes, largest.w, step);
    largest = max_halves(largest, other);
  }
  if (place.first_row == 0) {
    float of_channel[8];
    unpack<Element>(largest, of_channel);
#pragma unroll
    for (int e = 0; e < 8; ++e) slot.result[8 * place.vector + e] = of_channel[e];
  }
}

// Whether what a Hadamard transform mixes with this vector has a number that is not finite.
template <class Element>
__device__ bool spoiled(const QuantizeParams& params, int position, const uint4* stage, int row,
                        int vector) {
  const int mixed = params.hadamard_log2 > 3 ? 1 << (params.hadamard_log2 - 3) : 1;  // vectors
  bool found = false;
#pragma unroll 1
  for (int m = 0; m < mixed; ++m) {
    float x[8];
    load_rotated<Element>(params.rotary, position, stage, row, vector / mixed * mixed + m, x);
#pragma unroll
    for (float value : x) found |= !(fabsf(value) < INFINITY);
  }
  return found;
}

// Sums of this thread's channels over its rows, as they came.
template <class Shape>
__device__ void sum_of_rows(const Task& task, const uint4* stage, float (&sum)[8]) {
  const MeasurePlace<Shape> place;
#pragma unroll
  for (int i = 0; i < kQuantizeTokens / 16; ++i) {
    const int row = place.first_row + 16 * i;
    if (row >= task.rows) continue;
    float x[8];
    unpack<typename Shape::Element>(stage[vector_place(row, place.vector)], x);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += x[e];
  }
}

// The same after rotary embedding; where only_finite, without what would not be finite after the
// Hadamard transform.
template <class Shape>
__device__ void sum_of_rotated_rows(const QuantizeParams& params, const Task& task,
                                    const uint4* stage, bool only_finite, float (&sum)[8]) {
  using Element = typename Shape::Element;
  const MeasurePlace<Shape> place;
#pragma unroll 1
  for (int row = place.first_row; row < task.rows; row += 16) {
    const int position = rotary_position(params, task, row);
    float x[8];
    load_rotated<Element>(params.rotary, position, stage, row, place.vector, x);
    if (only_finite) {
      const bool mixes = params.hadamard_log2 > 0;
      if (mixes && spoiled<Element>(params, position, stage, row, place.vector)) continue;
#pragma unroll
      for (float& value : x) value = fabsf(value) < INFINITY ? value : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += x[e];
  }
}

// K's sums over the tile, before signs and Hadamard, which are taken of their mean: both are
// linear.
template <class Shape>
__device__ void measure_sums(const QuantizeParams& params, typename Shape::Slot& slot,
                             const uint4* stage) {
  const MeasurePlace<Shape> place;
  float sum[8] = {};
  if (params.rotary.dim == 0) {
    sum_of_rows<Shape>(slot.task, stage, sum);
  } else {
    sum_of_rotated_rows<Shape>(params, slot.task, stage, false, sum);
  }
  bool finite = true;
#pragma unroll
  for (float value : sum) finite &= fabsf(value) < INFINITY;
  if (team_any<Shape>(!finite)) {
#pragma unroll
    for (float& value : sum) value = 0.0f;
    sum_of_rotated_rows<Shape>(params, slot.task, stage, true, sum);
  }
  __syncwarp();
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
#pragma unroll
    for (float& value : sum) value += __shfl_xor_sync(kAllLanes, value, step);
  }
  if (place.first_row == 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) slot.result[8 * place.vector + e] = sum[e];
  }
}

}  // namespace hopper_attention
