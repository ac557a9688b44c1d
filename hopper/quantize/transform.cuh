// The Walsh-Hadamard transform of rows, and largest values.
#pragma once

#include <cmath>

#include "quantize/task.cuh"

namespace hopper_attention {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

// Butterflies of stride 1, 2, 4, ... channels up to 2^log2 / 2, then one multiplication: the order
// is part of the definition, since it settles the rounding. A row's channels are numbered by
// (i, lane, e), e the fastest.
template <class Shape>
__device__ void hadamard(float (&x)[4][8], int log2, float scale) {
  constexpr int kLaneBits = Shape::kLanes == 2 ? 1 : Shape::kLanes == 4 ? 2 : 3;
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if ((e & stride) == 0) butterfly(x[i][e], x[i][e + stride]);
      }
    }
  }
  const int thread = thread_idx();
#pragma unroll
  for (int bit = 0; bit < kLaneBits; ++bit) {
    if (log2 <= 3 + bit) break;
    const float sign = (thread >> bit) & 1 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (float& value : x[i]) {
        value = __fmaf_rn(value, sign, __shfl_xor_sync(kAllLanes, value, 1 << bit));
      }
    }
  }
#pragma unroll
  for (int bit = 0; bit < 2; ++bit) {
    if (log2 <= 3 + kLaneBits + bit) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if ((i >> bit & 1) == 0) butterfly(x[i][e], x[i + (1 << bit)][e]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (float& value : x[i]) value *= scale;
  }
}

// Subtracts K's mean from a row that exists.
template <class Shape>
__device__ void subtract_mean(const QuantizeParams& params, const Task& task, float (&x)[4][8]) {
  const QuantizeTensor& k = params.tensors[kK];
  const RowPlace<Shape> place;
  if (place.row >= task.rows) return;
  const float* mean = params.k_mean + task.group(k) * k.head_dim;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int vector = place.vector(i);
    if (8 * vector >= k.head_dim) break;
    const auto* from = reinterpret_cast<const float4*>(mean + 8 * vector);
    const float4 low = __ldcg(from), high = __ldcg(from + 1);
    x[i][0] -= low.x, x[i][1] -= low.y, x[i][2] -= low.z, x[i][3] -= low.w;
    x[i][4] -= high.x, x[i][5] -= high.y, x[i][6] -= high.z, x[i][7] -= high.w;
  }
}

__device__ inline float largest(const float (&x)[4][8]) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) amax = fmaxf(amax, fabsf(x[i][e]));  // passes over NaN
  }
  return amax;
}

// Turns infinities into NaN, since the conversion would saturate them; returns the largest of the
// finite |x|.
__device__ inline float largest_finite(float (&x)[4][8]) {
  const float amax = largest(x);
  if (amax < INFINITY) return amax;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (float& value : x[i]) {
      if (fabsf(value) == INFINITY) value = __uint_as_float(0x7fffffffu);
    }
  }
  return largest(x);
}

// Numbers that are not negative are ordered as their bits are.
__device__ inline std::uint32_t warp_largest(float amax) {
  return __reduce_max_sync(kAllLanes, __float_as_uint(amax));
}

// Over all threads, which must all come here. The shared memory is not the last task's, so that a
// slow thread can still read that when the fast ones are here.
template <class Shape>
__device__ float block_largest(float amax, std::uint32_t (&shared)[32]) {
  const std::uint32_t of_warp = warp_largest(amax);
  const int thread = thread_idx(), lane = thread % 32;
  if (lane == 0) shared[thread / 32] = of_warp;
  __syncthreads();
  const std::uint32_t mine = lane < Shape::kWarps ? shared[lane] : 0u;
  return __uint_as_float(__reduce_max_sync(kAllLanes, mine));
}

template <class Shape>
__device__ float row_largest(float amax) {
#pragma unroll
  for (int step = 1; step < Shape::kLanes; step *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, step));
  }
  return amax;
}

// Raises *to; most calls find that they need not.
__device__ inline void raise(std::uint32_t* to, std::uint32_t bits) {
  if (bits > __ldcg(to)) atomicMax(to, bits);
}

constexpr float kSmallestAmax = 0x1p-100f;

// The stored scale, x / x_quantized, and what x is multiplied by.
__device__ inline float descale_of(float amax) {
  return amax > 0.0f ? fmaxf(amax, kSmallestAmax) / kE4M3Max : 1.0f;
}
__device__ inline float inverse_of(float amax) {
  return amax > 0.0f ? kE4M3Max / fmaxf(amax, kSmallestAmax) : 1.0f;
}

// Two floats to two e4m3, the first in the low byte. Finite values saturate; NaN becomes 0x7f.
__device__ inline std::uint32_t to_e4m3x2(float low, float high) {
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline std::uint32_t to_e4m3x4(float a, float b, float c, float d) {
  return to_e4m3x2(a, b) | to_e4m3x2(c, d) << 16;
}

}  // namespace hopper_attention
