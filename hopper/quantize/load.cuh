// From global memory through shared memory to floats in registers.
#pragma once

#include "quantize/task.cuh"

namespace hopper_attention {

__device__ inline void copy_async(uint4* to, const void* from, bool valid) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// For tensors whose address or strides are no multiples of 16 bytes.
__device__ inline void copy_unaligned(uint4* to, const std::uint16_t* from, bool valid) {
  auto* elements = reinterpret_cast<std::uint16_t*>(to);
#pragma unroll 1
  for (int e = 0; e < 8; ++e) elements[e] = valid ? __ldg(from + e) : std::uint16_t{0};
}

// Starts the copies of a task's vectors, each thread its own; places past the end become 0.
template <class Shape>
__device__ void start_loads(const QuantizeParams& params, const Task& task,
                            uint4 (&stage)[4][Shape::kThreads]) {
  const QuantizeTensor& tensor = params.tensors[task.which];
  const RowPlace<Shape> by_row;
  const ColumnPlace<Shape> by_column;
  const bool columns = task.which == kV;
  const auto* base = static_cast<const std::uint16_t*>(tensor.in) +
                     task.head * tensor.in_stride_head + task.memory * tensor.in_stride_seq;
  if (tensor.cu_seqlens == nullptr) base += task.sequence * tensor.in_stride_batch;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = columns ? by_column.row(i) : by_row.row;
    const int vector = columns ? by_column.vector : by_row.vector(i);
    const bool valid = row < task.rows && 8 * vector < tensor.head_dim;
    const auto* from = valid ? base + row * tensor.in_stride_seq + 8 * vector
                             : static_cast<const std::uint16_t*>(tensor.in);
    if (tensor.aligned) {
      copy_async(&stage[i][by_row.thread], from, valid);
    } else {
      copy_unaligned(&stage[i][by_row.thread], from, valid);
    }
  }
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

template <class Shape>
__device__ void load_columns(const uint4 (&stage)[4][Shape::kThreads], float (&x)[4][8]) {
  const int thread = thread_idx();
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack<typename Shape::Element>(stage[i][thread], x[i]);
}

__device__ inline uint4 flip(uint4 vector, const uint4& signs) {
  return {vector.x ^ signs.x, vector.y ^ signs.y, vector.z ^ signs.z, vector.w ^ signs.w};
}

// Signs of two neighbouring channels are bits 15 and 31 of a word.
__device__ inline void flip(float& low, float& high, std::uint32_t signs) {
  low = __uint_as_float(__float_as_uint(low) ^ (signs << 16));
  high = __uint_as_float(__float_as_uint(high) ^ (signs & 0x80000000u));
}

// The position that rotary embedding gives to a row of q or k.
__device__ inline std::int64_t rotary_position(const QuantizeParams& params, const Task& task,
                                               int row) {
  const QuantizeRotary& rotary = params.rotary;
  const std::int64_t token = static_cast<std::int64_t>(task.first) + row;
  if (task.which == kK) return token + rotary.k_offset;
  if (!rotary.q_aligned) return token + rotary.q_offset;
  const QuantizeTensor& k = params.tensors[kK];
  int seqlen_k = k.seqlen;
  if (k.cu_seqlens != nullptr) {
    seqlen_k = __ldg(k.cu_seqlens + task.sequence + 1) - __ldg(k.cu_seqlens + task.sequence);
  }
  return token + rotary.q_offset + seqlen_k - task.seqlen;
}

__device__ inline void load_floats(const float* from, float (&to)[4]) {
  const float4 values = __ldg(reinterpret_cast<const float4*>(from));
  to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
}

// Turns one vector of a row. partner is the vector that holds the other halves of its pairs.
template <class Element>
__device__ void rotate_pairs(const QuantizeRotary& rotary, std::int64_t position, int vector,
                             const uint4* partner, float (&x)[8]) {
  const int half = rotary.dim / 2;
  if (rotary.interleaved) {
    const std::int64_t at = position * half + 4 * vector;
    float c[4], s[4];
    load_floats(rotary.cos + at, c);
    load_floats(rotary.sin + at, s);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float first = x[2 * m], second = x[2 * m + 1];
      x[2 * m] = first * c[m] - second * s[m];
      x[2 * m + 1] = second * c[m] + first * s[m];
    }
    return;
  }
  const bool is_first = 8 * vector < half;
  const std::int64_t at = position * half + 8 * vector - (is_first ? 0 : half);
#pragma unroll
  for (int part = 0; part < 8; part += 4) {
    float c[4], s[4], other[4];
    load_floats(rotary.cos + at + part, c);
    load_floats(rotary.sin + at + part, s);
    const uint2 pairs = reinterpret_cast<const uint2*>(partner)[part / 4];
    unpack(pairs.x, other[0], other[1], Element{});
    unpack(pairs.y, other[2], other[3], Element{});
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float sine = is_first ? -s[m] : s[m];
      x[part + m] = x[part + m] * c[m] + other[m] * sine;
    }
  }
}

// The vectors of a row of q or k, after rotary embedding and random signs.
template <class Shape>
__device__ void load_rows(const QuantizeParams& params, const Task& task,
                          const uint4 (&stage)[4][Shape::kThreads],
                          const uint4 (&signs)[Shape::kHeadDim / 8], float (&x)[4][8]) {
  using Element = typename Shape::Element;
  const RowPlace<Shape> place;
  const QuantizeRotary& rotary = params.rotary;
  if (rotary.dim == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unpack<Element>(flip(stage[i][place.thread], signs[place.vector(i)]), x[i]);
    }
    return;
  }
  const std::int64_t position = rotary_position(params, task, place.row);
  const bool known = position >= 0 && position < rotary.max_len;
  const int half = rotary.dim / 16;  // in vectors
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int vector = place.vector(i);
    unpack<Element>(stage[i][place.thread], x[i]);
    if (place.row < task.rows && vector < 2 * half) {
      if (known) {
        const int other = vector < half ? vector + half : vector - half;
        const uint4* partner =
            &stage[other / Shape::kLanes][place.row * Shape::kLanes + other % Shape::kLanes];
        rotate_pairs<Element>(rotary, position, vector, partner, x[i]);
      } else {
#pragma unroll
        for (float& value : x[i]) value = __uint_as_float(0x7fffffffu);
      }
    }
    const uint4 sign = signs[vector];
    flip(x[i][0], x[i][1], sign.x);
    flip(x[i][2], x[i][3], sign.y);
    flip(x[i][4], x[i][5], sign.z);
    flip(x[i][6], x[i][7], sign.w);
  }
}

}  // namespace hopper_attention
