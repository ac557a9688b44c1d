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

// Butterflies of stride 1, 2, 4, ... channels up to 2^kLog2 / 2: their order is part of the
// definition, since it settles the rounding. A row's channels are numbered by (part, i, e), e the
// fastest. The scale is still to be multiplied by.
template <class Shape, int kLog2>
__device__ void hadamard(float (&x)[8][8]) {
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if ((e & stride) == 0) butterfly(x[i][e], x[i][e + stride]);
      }
    }
  }
#pragma unroll
  for (int stride = 1; stride < 8 && 8 * stride < 1 << kLog2; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if ((i & stride) == 0) butterfly(x[i][e], x[i + stride][e]);
      }
    }
  }
#pragma unroll
  for (int stride = 1; 64 * stride < 1 << kLog2; stride *= 2) {
    const float sign = RowPlace<Shape>{}.part & stride ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (float& value : x[i]) {
        const float other = __shfl_xor_sync(kAllLanes, value, stride * Shape::kWarpRows);
        value = __fmaf_rn(value, sign, other);
      }
    }
  }
}

// A loop over the strides with its end known at run time only would be spilled.
template <class Shape, int kLog2 = 3>
__device__ void hadamard(float (&x)[8][8], int log2) {
  if (log2 == kLog2) {
    hadamard<Shape, kLog2>(x);
  } else if constexpr (2 << kLog2 <= Shape::kHeadDim) {
    hadamard<Shape, kLog2 + 1>(x, log2);
  }
}

__device__ inline void multiply(float (&x)[8][8], float factor) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (float& value : x[i]) value *= factor;
  }
}

// K's mean, of all channels.
template <class Shape>
__device__ void subtract_mean(const float* mean, float (&x)[8][8]) {
  const RowPlace<Shape> place;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto* from = reinterpret_cast<const float4*>(mean + 8 * place.vector(i));
    const float4 low = from[0], high = from[1];
    x[i][0] -= low.x, x[i][1] -= low.y, x[i][2] -= low.z, x[i][3] -= low.w;
    x[i][4] -= high.x, x[i][5] -= high.y, x[i][6] -= high.z, x[i][7] -= high.w;
  }
}

// Of the numbers; NaN is passed over.
__device__ inline float largest(const float (&x)[8][8]) {
  float of[4] = {};  // chains that run side by side
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) of[e % 4] = fmaxf(of[e % 4], fabsf(x[i][e]));
  }
  return fmaxf(fmaxf(of[0], of[1]), fmaxf(of[2], of[3]));
}

// Infinities to NaN, since the conversion would saturate them.
template <int kCount>
__device__ void hide_infinities(float (&x)[kCount][8]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (float& value : x[i]) {
      if (fabsf(value) == INFINITY) value = __uint_as_float(0x7fffffffu);
    }
  }
}

// Of the finite numbers; infinities become NaN.
__device__ inline float largest_finite(float (&x)[8][8], bool* infinite) {
  const float amax = largest(x);
  *infinite = !(amax < INFINITY);
  if (!*infinite) return amax;
  hide_infinities(x);
  return largest(x);
}

// Numbers that are not negative are ordered as their bits are.
__device__ inline std::uint32_t warp_largest(float amax) {
  return __reduce_max_sync(kAllLanes, __float_as_uint(amax));
}

// Over the team, all of which must come here. of_warps is the task's, so that a slow thread can
// still read it when the fast ones are at the next one.
template <class Shape>
__device__ float team_largest(float amax, float* of_warps) {
  const std::uint32_t of_warp = warp_largest(amax);
  const int thread = team_thread<Shape>(), lane = thread % 32;
  if (lane == 0) of_warps[thread / 32] = __uint_as_float(of_warp);
  sync_team<Shape>();
  const std::uint32_t mine = __float_as_uint(of_warps[lane % Shape::kTeamWarps]);
  return __uint_as_float(__reduce_max_sync(kAllLanes, mine));
}

// Over the threads of a row.
template <class Shape>
__device__ float row_largest(float amax) {
#pragma unroll
  for (int step = Shape::kWarpRows; step < 32; step *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, step));
  }
  return amax;
}

constexpr float kSmallestAmax = 0x1p-100f;

// The stored scale, x / x_quantized, and what x is multiplied by.
__device__ inline float descale_of(float amax) {
  return amax > 0.0f ? fmaxf(amax, kSmallestAmax) / kE4M3Max : 1.0f;
}
__device__ inline float inverse_of(float amax) {
  return amax > 0.0f ? kE4M3Max / fmaxf(amax, kSmallestAmax) : 1.0f;
}

// A token's descale over its head's largest; a token of zeros takes any factor.
__device__ inline float token_factor(float amax, float of_head) {
  return fmaxf(amax > 0.0f ? descale_of(amax) / of_head : 1.0f, 0x1p-126f);
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
