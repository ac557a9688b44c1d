// Tiles of v that are transposed: a thread has 8 channels of four tokens that are neighbours there,
// so that four bytes make a word.
#pragma once

#include "quantize/measure.cuh"

namespace hopper_attention {

// Half of the tile, scaled, to `words` as (channel, 4 tokens). A channel's chunks of 16 tokens are
// permuted by its number, so that neither the writes nor the reads meet in a bank.
template <class Shape>
__device__ void transpose_half(const Task& task, bool infinite, const uint4* stage, int turn,
                               const typename Shape::Slot& slot, bool by_channel,
                               const float* of_token, std::uint32_t* words) {
  const ColumnPlace<Shape> place;
  float x[4][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = place.row(turn, i);
    unpack<typename Shape::Element>(stage[vector_place(row, place.vector)], x[i]);
  }
  if (task.rows < kQuantizeTokens) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float (&one)[1][8] = *reinterpret_cast<float (*)[1][8]>(&x[i]);
      clear_unless(place.row(turn, i) < task.rows, one);
    }
  }
  if (infinite) hide_infinities(x);
  if (of_token != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float inverse = of_token[place.row(turn, i)];
#pragma unroll
      for (float& value : x[i]) value *= inverse;
    }
  } else {
    const auto* values = reinterpret_cast<const float4*>(slot.values + 8 * place.vector);
#pragma unroll
    for (int e = 0; e < 8; e += 4) {
      float4 of = {slot.inverse, slot.inverse, slot.inverse, slot.inverse};
      if (by_channel) of = values[e / 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i][e] *= of.x, x[i][e + 1] *= of.y, x[i][e + 2] *= of.z, x[i][e + 3] *= of.w;
      }
    }
  }
  const int column = 4 * (place.group(turn) ^ (place.vector % 8)) + place.quad;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    words[(8 * place.vector + e) * 32 + column] = to_e4m3x4(x[0][e], x[1][e], x[2][e], x[3][e]);
  }
}

// Channels of 128 tokens, from what transpose_half left.
template <class Shape>
__device__ void store_channels(const QuantizeTensor& v, const Task& task, const uint4* chunks) {
  if (task.slot >= v.slots) return;
  const int thread = team_thread<Shape>(), chunk = thread % 8;
  std::uint8_t* out = v.out + task.head * v.out_stride_head +
                      static_cast<std::int64_t>(task.slot) * kQuantizeTokens + 16 * chunk;
  if (v.cu_seqlens == nullptr) out += task.sequence * v.out_stride_batch;
  out += thread / 8 * v.out_stride_seq;
#pragma unroll
  for (int channel = thread / 8; channel < Shape::kHeadDim; channel += Shape::kTeamThreads / 8) {
    if (channel < v.head_dim) {
      __stcs(reinterpret_cast<uint4*>(out), chunks[8 * channel + (chunk ^ (channel / 8 % 8))]);
    }
    out += Shape::kTeamThreads / 8 * v.out_stride_seq;
  }
}

template <class Shape>
__device__ void take_columns(const QuantizeParams& params, typename Shape::Shared& shared, int n) {
  const QuantizeTensor& v = params.tensors[kV];
  const int team = team_idx<Shape>();
  typename Shape::Slot& slot = shared.slot(n);
  const bool by_token = v.scale == ScaleKind::kToken;
  OutLeft& left = shared.left[thread_idx() / 32];
  bool infinite;
  if (by_token) {
    bool own_infinite;
    const float inverse = find_token_scale<Shape>(params, slot, shared.stage(n), &own_infinite);
    const RowPlace<Shape> place;
    if (place.part == 0) shared.token_inverse[team][place.row] = inverse;
    if (left == OutLeft::kRows && thread_idx() % 32 == 0) cute::tma_store_wait<0>();
    infinite = team_any<Shape>(own_infinite);
  } else {
    if (left == OutLeft::kRows && thread_idx() % 32 == 0) cute::tma_store_wait<0>();
    if (left != OutLeft::kNothing) sync_team<Shape>();
    infinite = slot.given_infinite;
  }
  const float* of_token = by_token ? shared.token_inverse[team] : nullptr;
  auto* words = reinterpret_cast<std::uint32_t*>(shared.out[team]);
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
    transpose_half<Shape>(slot.task, infinite, shared.stage(n), turn, slot,
                          v.scale == ScaleKind::kChannel, of_token, words);
  }
  shared.release_stage(n);
  sync_team<Shape>();
  store_channels<Shape>(v, shared.slot(n).task, shared.out[team]);
  left = OutLeft::kColumns;
}

}  // namespace hopper_attention
