// What is found from the elements as they came. Passes that do no more look for largest magnitudes
// and K's sums: a thread has 8 channels of 8 rows. The last pass over v looks for those of tokens.
#pragma once

#include "quantize/load.cuh"
#include "quantize/matrix.cuh"
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

// The words of two rows, below and above, without those of others.
__device__ inline std::uint32_t keep_rows(std::uint32_t words, int row, int rows) {
  return row + 1 < rows ? words : row < rows ? words & 0xffffu : 0;
}

// Sums of a warp's 16 channels over the tile, as they came: the tensor cores add up 16 rows at a
// time. A lane has four channels, (8 c + 2 (lane % 4), and the next), c = 0, 1.
template <class Shape>
__device__ void sum_by_matrices(const Task& task, const uint4* stage, float (&sum)[4]) {
  using Element = typename Shape::Element;
  const int thread = team_thread<Shape>(), lane = thread % 32;
  const uint4* from = stage + vector_place(lane % 16, thread / 32 * 2 + lane / 16);
  constexpr std::uint32_t kOnes = kOne<Element> * 0x10001u;
#pragma unroll
  for (int first = 0; first < kQuantizeTokens; first += 16) {
    uint4 words = load_transposed(from + 8 * first);
    if (task.rows < kQuantizeTokens) {
      const int row = first + lane % 4 * 2;
      words.x = keep_rows(words.x, row, task.rows);
      words.y = keep_rows(words.y, row + 8, task.rows);
      words.z = keep_rows(words.z, row, task.rows);
      words.w = keep_rows(words.w, row + 8, task.rows);
    }
    float low[4], high[4];
    multiply({kOnes, kOnes, kOnes, kOnes}, words.x, words.y, low, Element{});
    multiply({kOnes, kOnes, kOnes, kOnes}, words.z, words.w, high, Element{});
    sum[0] += low[0], sum[1] += low[1], sum[2] += high[0], sum[3] += high[1];
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

// Whether anyone of the team has a number that is not finite.
template <class Shape, int kCount>
__device__ bool any_infinite(const float (&sum)[kCount]) {
  bool finite = true;
#pragma unroll
  for (float value : sum) finite &= fabsf(value) < INFINITY;
  return team_any<Shape>(!finite);
}

// K's sums over the tile, before signs and Hadamard, which are taken of their mean: both are
// linear. All warps store them; the publishing warp only counts the tile.
template <class Shape>
__device__ void measure_sums(const QuantizeParams& params, typename Shape::Slot& slot,
                             const uint4* stage) {
  const MeasurePlace<Shape> place;
  const int head_dim = params.tensors[kK].head_dim;
  float* sums = partial_sums(params, slot.task);
  if (params.rotary.dim == 0) {
    float of[4] = {};
    sum_by_matrices<Shape>(slot.task, stage, of);
    if (!any_infinite<Shape>(of)) {
      if (place.thread % 32 >= 4 || slot.task.rows <= 0) return;
      const int channel = place.thread / 32 * 16 + place.thread % 32 * 2;
      auto* to = reinterpret_cast<float2*>(sums + channel);
      if (channel < head_dim) to[0] = {of[0], of[1]};
      if (channel + 8 < head_dim) to[4] = {of[2], of[3]};
      return;
    }
  }
  float sum[8] = {};
  bool only_finite = params.rotary.dim == 0;
  if (!only_finite) {
    sum_of_rotated_rows<Shape>(params, slot.task, stage, false, sum);
    only_finite = any_infinite<Shape>(sum);
  }
  if (only_finite) {
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
  if (place.first_row != 0 || slot.task.rows <= 0 || 8 * place.vector >= head_dim) return;
  auto* to = reinterpret_cast<float4*>(sums + 8 * place.vector);
  to[0] = {sum[0], sum[1], sum[2], sum[3]};
  to[1] = {sum[4], sum[5], sum[6], sum[7]};
}

}  // namespace hopper_attention
