// Rows of q and k whose Walsh-Hadamard transform begins in the tensor cores: 16 neighbouring
// channels of 8 tokens at a time are multiplied by a 16 x 16 matrix of signs, and what remains adds
// a thread's own numbers.
//
// A thread has the channels 16 g + 2 m and the next of every g, m = lane / 4, of the tokens
// 8 n + 2 (lane % 4) and the next of every n: (g, n) has four numbers, (token, channel) = (0, 0),
// (1, 0), (0, 1), (1, 1), as the accumulators have them.
#pragma once

#include "quantize/matrix.cuh"
#include "quantize/rows.cuh"

namespace hopper_attention {

// A lane's part of the Walsh-Hadamard matrix of 16 channels. The rows come as even ones, odd ones:
// so a thread gets neighbours.
template <class Element>
__device__ uint4 hadamard_matrix(int lane) {
  constexpr std::uint32_t kNegative = 0x80008000u;
  const int row = lane / 4, column = lane % 4;  // pairs of them; and columns 8 + the same
  const std::uint32_t first = kOne<Element> * 0x10001u ^ (__popc(row & column) & 1) * kNegative;
  const std::uint32_t second = first ^ (row / 4) * kNegative;
  return {first, first ^ kNegative << 16, second, second ^ kNegative << 16};
}

template <class Shape>
struct Mixed {
  static constexpr int kGroups = Shape::kHeadDim / 16;
  static constexpr int kTiles = Shape::kWarpRows / 8;
  static_assert(kGroups * kTiles == 16);

  float of[kGroups][kTiles][4];

  template <class Function>
  __device__ void each(const Function& function) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) function(of[g][n][e], g, n, e);
      }
    }
  }
};

// Its tokens and channels, see above.
template <class Shape>
struct MixedPlace {
  int thread = team_thread<Shape>();
  int lane = thread % 32;
  int first_row = thread / 32 * Shape::kWarpRows;
  __device__ int row(int n, int e) const { return first_row + 8 * n + 2 * (lane % 4) + e % 2; }
  __device__ int channel(int g) const { return 16 * g + lane / 4 * 2; }
};

// The transform of every 16 channels, with the random signs.
template <class Shape>
__device__ void load_mixed(const uint4* stage, const uint4* signs, Mixed<Shape>& x) {
  using Element = typename Shape::Element;
  const MixedPlace<Shape> place;
  // A lane names a row of one of the four vectors that are two groups.
  const int row = place.first_row + place.lane % 8;
  const uint4* from = stage + vector_place(row, place.lane / 8);
  const uint4* from_odd = stage + vector_place(row, place.lane / 8 + 4);
  const uint4* of_lane = signs + place.lane % 4;
  const uint4 matrix = hadamard_matrix<Element>(place.lane);
#pragma unroll
  for (int g = 0; g < Mixed<Shape>::kGroups; g += 2) {
    const uint4 sign = of_lane[2 * g];
#pragma unroll
    for (int n = 0; n < Mixed<Shape>::kTiles; ++n) {
      const uint4* at = (g % 4 == 0 ? from : from_odd) + g / 4 * kQuantizeTokens * 8 + 64 * n;
      const uint4 words = flip(load_matrices(at), sign);
      multiply(matrix, words.x, words.y, x.of[g][n], Element{});
      multiply(matrix, words.z, words.w, x.of[g + 1][n], Element{});
    }
  }
}

// The rest: butterflies of stride 16, 32, ... channels up to 2^kLog2 / 2.
template <class Shape, int kLog2>
__device__ void mix_groups(Mixed<Shape>& x) {
#pragma unroll
  for (int stride = 1; 16 * stride < 1 << kLog2; stride *= 2) {
#pragma unroll
    for (int g = 0; g < Mixed<Shape>::kGroups; ++g) {
      if ((g & stride) != 0) continue;
#pragma unroll
      for (int n = 0; n < Mixed<Shape>::kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) butterfly(x.of[g][n][e], x.of[g + stride][n][e]);
      }
    }
  }
}

template <class Shape, int kLog2 = 4>
__device__ void mix_groups(Mixed<Shape>& x, int log2) {
  if (log2 == kLog2) {
    mix_groups<Shape, kLog2>(x);
  } else if constexpr (2 << kLog2 <= Shape::kHeadDim) {
    mix_groups<Shape, kLog2 + 1>(x, log2);
  }
}

// The rows of the n-th task, and the factor that they still lack.
template <class Shape>
__device__ float mixed_rows(const QuantizeParams& params, typename Shape::Shared& shared, int n,
                            Mixed<Shape>& x) {
  load_mixed<Shape>(shared.stage(n), shared.signs_of_lanes, x);
  shared.release_stage(n);
  mix_groups<Shape>(x, params.hadamard_log2);
  const typename Shape::Slot& slot = shared.slot(n);
  const bool smooth = slot.task.subtracts_mean(params);
  if (smooth) {
    x.each([&](float& value, int, int, int) { value *= params.hadamard_scale; });
    const MixedPlace<Shape> place;
#pragma unroll
    for (int g = 0; g < Mixed<Shape>::kGroups; ++g) {
      const float2 mean = *reinterpret_cast<const float2*>(slot.values + place.channel(g));
#pragma unroll
      for (auto& four : x.of[g]) {
        four[0] -= mean.x, four[1] -= mean.x, four[2] -= mean.y, four[3] -= mean.y;
      }
    }
  }
  if (slot.task.rows < kQuantizeTokens) {
    const MixedPlace<Shape> place;
    x.each([&](float& value, int, int tile, int e) {
      if (place.row(tile, e) >= slot.task.rows) value = 0.0f;
    });
  }
  return smooth ? 1.0f : params.hadamard_scale;
}

// Largest magnitudes of this thread's tokens, over its channels; NaN is passed over.
template <class Shape>
__device__ void token_largest(Mixed<Shape>& x, float (&amax)[Mixed<Shape>::kTiles][2]) {
#pragma unroll
  for (auto& pair : amax) pair[0] = pair[1] = 0.0f;
  x.each([&](float& value, int, int n, int e) {
    amax[n][e % 2] = fmaxf(amax[n][e % 2], fabsf(value));
  });
}

template <int kTiles>
__device__ float largest_of(const float (&amax)[kTiles][2]) {
  float all = 0.0f;
#pragma unroll
  for (const auto& pair : amax) all = fmaxf(all, fmaxf(pair[0], pair[1]));
  return all;
}

template <class Shape>
__device__ void hide_infinities(Mixed<Shape>& x) {
  x.each([](float& value, int, int, int) {
    if (fabsf(value) == INFINITY) value = __uint_as_float(0x7fffffffu);
  });
}

// What each of this warp's rows is multiplied by, to `scales`; its descale is written.
template <class Shape>
__device__ void find_row_scales(const QuantizeTensor& tensor, const Task& task, float factor,
                                const float (&amax)[Mixed<Shape>::kTiles][2], float* scales) {
#pragma unroll
  for (int n = 0; n < Mixed<Shape>::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float of_row = amax[n][e];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        of_row = fmaxf(of_row, __shfl_xor_sync(kAllLanes, of_row, step));
      }
      const MixedPlace<Shape> place;
      if (place.lane < 4) scales[place.row(n, e)] = of_row * factor;
    }
  }
  __syncwarp();
  const MixedPlace<Shape> place;
  if (place.lane < Shape::kWarpRows) {
    const int row = place.first_row + place.lane;
    const float of_row = scales[row];
    if (row < task.rows) {
      tensor.descale[task.dense_group(tensor) * tensor.seqlen + task.memory + row] =
          descale_of(of_row);
    }
    scales[row] = inverse_of(of_row) * factor;
  }
  __syncwarp();
}

// What a tile is multiplied by; its descale is written.
template <class Shape>
__device__ float find_block_scale(const QuantizeTensor& tensor, typename Shape::Slot& slot,
                                  float amax) {
  const Task& task = slot.task;
  amax = team_largest<Shape>(amax, slot.result);
  if (team_thread<Shape>() == 0 && task.slot < tensor.slots) {
    tensor.descale[task.dense_group(tensor) * tensor.slots + task.slot] = descale_of(amax);
  }
  return inverse_of(amax);
}

// A warp's rows, scaled, to `out`: four groups of 8 tokens at a time. of_rows: scales of their own,
// or null.
template <class Shape>
__device__ void write_mixed(uint4* out, const Mixed<Shape>& x, float scale, const float* of_rows) {
  const MixedPlace<Shape> place;
  uint4* to = out + chunk_place<Shape>(place.lane % 8, place.lane / 8);
  uint4* to_odd = out + chunk_place<Shape>(place.lane % 8, place.lane / 8 + 4);
  constexpr int kRow = Shape::kHeadDim == 64 ? 4 : 8;  // chunks of a row that lie together
#pragma unroll
  for (int n = 0; n < Mixed<Shape>::kTiles; ++n) {
    float2 of = {scale, scale};
    if (of_rows != nullptr) of = *reinterpret_cast<const float2*>(of_rows + place.row(n, 0));
#pragma unroll
    for (int g = 0; g < Mixed<Shape>::kGroups; g += 4) {
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&four)[4] = x.of[g + i][n];
        words[i] = to_e4m3x4(four[0] * of.x, four[2] * of.x, four[1] * of.y, four[3] * of.y);
      }
      store_transposed((g % 8 == 0 ? to : to_odd) + g / 8 * Shape::kWarpRows * 8 + 8 * kRow * n,
                       words);
    }
  }
}

// What a pass does with a tile of q or k: measures or writes it.
template <class Shape>
__device__ void take_mixed(const QuantizeParams& params, const QuantizeMaps& maps,
                           typename Shape::Shared& shared, int n) {
  Mixed<Shape> x;
  float scale = mixed_rows<Shape>(params, shared, n, x);
  typename Shape::Slot& slot = shared.slot(n);
  const QuantizeTensor& tensor = params.tensors[slot.task.which];
  if (slot.task.given_scale(tensor)) {
    if (slot.given_infinite) hide_infinities(x);
    scale *= slot.inverse;
  } else {
    float amax[Mixed<Shape>::kTiles][2];
    token_largest<Shape>(x, amax);
    const bool infinite = !(largest_of(amax) < INFINITY);
    if (infinite) {
      hide_infinities(x);
      token_largest<Shape>(x, amax);
    }
    if (tensor.scale == ScaleKind::kToken) {
      find_row_scales<Shape>(tensor, slot.task, scale, amax,
                             shared.token_inverse[team_idx<Shape>()]);
    } else if (slot.task.pass == QuantizePass::kAmax) {
      const RowPlace<Shape> place;
      const std::uint32_t of_warp = warp_largest(largest_of(amax) * scale);
      if (place.thread % 32 == 0) slot.result[place.warp] = __uint_as_float(of_warp);
      if (infinite) slot.infinite = 1;
      return;
    } else {
      scale *= find_block_scale<Shape>(tensor, slot, largest_of(amax) * scale);
    }
  }
  const Task& task = shared.slot(n).task;
  const int team = team_idx<Shape>();
  const bool by_row = params.tensors[task.which].scale == ScaleKind::kToken;
  uint4* out = begin_rows<Shape>(shared);
  write_mixed<Shape>(out, x, scale, by_row ? shared.token_inverse[team] : nullptr);
  send_rows<Shape>(params.tensors[task.which], maps.out[task.which], task, out);
}

}  // namespace hopper_attention
