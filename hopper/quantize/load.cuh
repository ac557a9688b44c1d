// From global memory through shared memory to floats in registers.
#pragma once

#include "quantize/task.cuh"

namespace hopper_attention {

// For tensors that TMA cannot read: the team fetches its tile itself; places past the end become 0.
template <class Shape>
__device__ void load_unaligned(const QuantizeTensor& tensor, const Task& task, uint4* stage) {
  const auto* base = static_cast<const std::uint16_t*>(tensor.in) +
                     task.head * tensor.in_stride_head + task.memory * tensor.in_stride_seq;
  if (tensor.cu_seqlens == nullptr) base += task.sequence * tensor.in_stride_batch;
#pragma unroll 1
  for (int at = team_thread<Shape>(); at < kQuantizeTokens * Shape::kVectors;
       at += Shape::kTeamThreads) {
    const int row = at / Shape::kVectors, vector = at % Shape::kVectors;
    const bool valid = row < task.rows && 8 * vector < tensor.head_dim;
    const std::uint16_t* from = base + row * tensor.in_stride_seq + 8 * vector;
    std::uint32_t words[4] = {};
    if (valid) {
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = __ldg(from + 2 * w) | __ldg(from + 2 * w + 1) << 16;
    }
    stage[vector_place(row, vector)] = {words[0], words[1], words[2], words[3]};
  }
  cute::tma_store_fence();  // the copy engine will write here next
  sync_team<Shape>();
}

__device__ inline void unpack(std::uint32_t pair, float& low, float& high, __nv_bfloat16) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}

__device__ inline void unpack(std::uint32_t pair, float& low, float& high, __half) {
  const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  low = values.x;
  high = values.y;
}

template <class Element>
__device__ void unpack(const uint4& vector, float (&x)[8]) {
  unpack(vector.x, x[0], x[1], Element{});
  unpack(vector.y, x[2], x[3], Element{});
  unpack(vector.z, x[4], x[5], Element{});
  unpack(vector.w, x[6], x[7], Element{});
}

// A pair of a vector, from shared memory.
template <class Element>
__device__ void unpack(const uint4* vector, int pair, float (&x)[2]) {
  unpack(reinterpret_cast<const std::uint32_t*>(vector)[pair], x[0], x[1], Element{});
}

__device__ inline uint4 flip(uint4 vector, const uint4& signs) {
  return {vector.x ^ signs.x, vector.y ^ signs.y, vector.z ^ signs.z, vector.w ^ signs.w};
}

// Signs of two neighbouring channels are bits 15 and 31 of a word.
__device__ inline void flip(float& low, float& high, std::uint32_t signs) {
  low = __uint_as_float(__float_as_uint(low) ^ (signs << 16));
  high = __uint_as_float(__float_as_uint(high) ^ (signs & 0x80000000u));
}

// The position that rotary embedding gives to a row of q or k; below 0 where its tables have none.
__device__ inline int rotary_position(const QuantizeParams& params, const Task& task, int row) {
  const QuantizeRotary& rotary = params.rotary;
  std::int64_t position = static_cast<std::int64_t>(task.first) + row;
  position += task.which == kK ? rotary.k_offset : rotary.q_offset;
  if (task.which == kQ && rotary.q_aligned) {
    const QuantizeTensor& k = params.tensors[kK];
    int seqlen_k = k.seqlen;
    if (k.cu_seqlens != nullptr) {
      seqlen_k = __ldg(k.cu_seqlens + task.sequence + 1) - __ldg(k.cu_seqlens + task.sequence);
    }
    position += seqlen_k - task.seqlen;
  }
  return position >= 0 && position < rotary.max_len ? static_cast<int>(position) : -1;
}

// One vector of a row, turned. partner is the vector that holds the other halves of its pairs. Two
// channels at a time: more would need more registers than a row of 64 leaves.
template <class Element>
__device__ void rotate_pairs(const QuantizeRotary& rotary, int position, int vector,
                             const uint4* own, const uint4* partner, float (&x)[8]) {
  const int half = rotary.dim / 2;
  const bool is_first = 8 * vector < half;
  const int pair = rotary.interleaved ? 4 * vector : is_first ? 8 * vector : 8 * vector - half;
  const std::int64_t at = static_cast<std::int64_t>(position) * half + pair;
  const float *cosines = rotary.cos + at, *sines = rotary.sin + at;
#pragma unroll
  for (int part = 0; part < 8; part += 2) {
    float of_own[2], other[2];
    float2 c, s;
    unpack<Element>(own, part / 2, of_own);
    if (rotary.interleaved) {
      c.x = c.y = __ldg(cosines + part / 2);
      s.y = __ldg(sines + part / 2);
      s.x = -s.y;
      other[0] = of_own[1], other[1] = of_own[0];
    } else {
      c = __ldg(reinterpret_cast<const float2*>(cosines + part));
      s = __ldg(reinterpret_cast<const float2*>(sines + part));
      unpack<Element>(partner, part / 2, other);
      if (is_first) s.x = -s.x, s.y = -s.y;
    }
    x[part] = of_own[0] * c.x + other[0] * s.x;
    x[part + 1] = of_own[1] * c.y + other[1] * s.y;
  }
}

// A row of a tile in shared memory.
struct StageRow {
  const uint4* stage;
  int row;
  __device__ const uint4* operator()(int vector) const { return stage + vector_place(row, vector); }
};

// A vector of a row of q or k after rotary embedding, if there is any. row(vector): in shared
// memory.
template <class Element, class Row>
__device__ void load_rotated(const QuantizeRotary& rotary, int position, const Row& row, int vector,
                             float (&x)[8]) {
  const uint4* own = row(vector);
  const int half = rotary.dim / 16;  // in vectors
  if (vector >= 2 * half) {
    unpack<Element>(*own, x);
  } else if (position >= 0) {
    const int other = vector < half ? vector + half : vector - half;
    rotate_pairs<Element>(rotary, position, vector, own, row(other), x);
  } else {
#pragma unroll
    for (float& value : x) value = __uint_as_float(0x7fffffffu);
  }
}

// A box of out, by TMA. Nobody reads it again here: it leaves L2 first.
__device__ inline void store_box(const CUtensorMap& map, const uint4* from, int channel, int token,
                                 int head, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint"
      " [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(&map),
      "r"(cute::cast_smem_ptr_to_uint(from)), "r"(channel), "r"(token), "r"(head), "r"(sequence),
      "l"(static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST))
      : "memory");
}

// For rows that are another sequence's, or were not loaded.
template <int kCount>
__device__ void clear_unless(bool exists, float (&x)[kCount][8]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (float& value : x[i]) value = exists ? value : 0.0f;
  }
}

// 64 channels of a row, after rotary embedding and random signs; 0 where there is no row.
template <class Shape>
__device__ void load_row(const QuantizeParams& params, const Task& task, const uint4* stage,
                         const uint4* signs, float (&x)[8][8]) {
  using Element = typename Shape::Element;
  const bool rotates = !Shape::kMixes && params.rotary.dim > 0 && task.which != kV;
  if (!rotates) {
    const RowPlace<Shape> place;
    // vector_place, with little arithmetic: a slab's rows begin at multiples of 8 vectors.
    const int first = vector_place(place.row, place.vector(0));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint4 vector = stage[first ^ i];
      if (!Shape::kMixes && task.which != kV) vector = flip(vector, signs[place.vector(i)]);
      unpack<Element>(vector, x[i]);
    }
  } else {
    const int position = rotary_position(params, task, RowPlace<Shape>{}.row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const RowPlace<Shape> place;
      load_rotated<Element>(params.rotary, position, StageRow{stage, place.row}, place.vector(i),
                            x[i]);
      const uint4 sign = signs[place.vector(i)];
      flip(x[i][0], x[i][1], sign.x);
      flip(x[i][2], x[i][3], sign.y);
      flip(x[i][4], x[i][5], sign.z);
      flip(x[i][6], x[i][7], sign.w);
    }
  }
  if (task.rows < kQuantizeTokens) clear_unless(RowPlace<Shape>{}.row < task.rows, x);
}

}  // namespace hopper_attention
