// Tiles whose rows stay rows: q, k, and v where it is not transposed. A thread has 64 channels of a
// row; a warp writes its rows by TMA.
#pragma once

#include "quantize/measure.cuh"

namespace hopper_attention {

// Finds the scale of this thread's row of q or k where it is the tile's own or the row's; one of
// those that share it writes its descale.
template <class Shape>
__device__ float own_scale(const QuantizeParams& params, typename Shape::Slot& slot, float amax) {
  const Task& task = slot.task;
  const QuantizeTensor& tensor = params.tensors[task.which];
  const RowPlace<Shape> place;
  if (tensor.scale == ScaleKind::kBlock) {
    amax = team_largest<Shape>(amax, slot.result);
    if (place.thread == 0 && task.slot < tensor.slots) {
      tensor.descale[task.dense_group(tensor) * tensor.slots + task.slot] = descale_of(amax);
    }
    return inverse_of(amax);
  }
  amax = row_largest<Shape>(amax);
  if (place.part == 0 && place.row < task.rows) {
    tensor.descale[task.dense_group(tensor) * tensor.seqlen + task.memory + place.row] =
        descale_of(amax);
  }
  return inverse_of(amax);
}

// Where 16 bytes of a row lie in a warp's part of `out`: as TMA's boxes of up to 128 channels are
// swizzled.
template <class Shape>
__device__ int chunk_place(int warp_row, int chunk) {
  if constexpr (Shape::kHeadDim == 64) return warp_row * 4 + (chunk ^ warp_row / 2) % 4;
  return chunk / 8 * Shape::kWarpRows * 8 + warp_row * 8 + (chunk ^ warp_row) % 8;
}

// The rows of a packed sequence's end, one by one: past them is another sequence.
template <class Shape>
__device__ void store_some_rows(const QuantizeTensor& tensor, const Task& task, const uint4* out) {
  const RowPlace<Shape> place;
  const int lane = place.thread % 32, first = place.warp * Shape::kWarpRows;
  std::uint8_t* base = tensor.out + task.head * tensor.out_stride_head +
                       (task.memory + first) * tensor.out_stride_seq;
#pragma unroll 1
  for (int at = lane; at < 128; at += 32) {
    const int row = at / (Shape::kHeadDim / 16), chunk = at % (Shape::kHeadDim / 16);
    if (first + row < task.rows && 16 * chunk < tensor.head_dim) {
      *reinterpret_cast<uint4*>(base + row * tensor.out_stride_seq + 16 * chunk) =
          out[chunk_place<Shape>(row, chunk)];
    }
  }
  __syncwarp();
}

// A warp's part of `out`, when what was there has been read.
template <class Shape>
__device__ uint4* begin_rows(typename Shape::Shared& shared) {
  const RowPlace<Shape> place;
  OutLeft& left = shared.left[thread_idx() / 32];
  if (left == OutLeft::kColumns) sync_team<Shape>();
  if (place.thread % 32 == 0) cute::tma_store_wait<0>();
  __syncwarp();
  left = OutLeft::kRows;
  return shared.out[team_idx<Shape>()] + place.warp * 128;
}

// From there to memory.
template <class Shape>
__device__ void send_rows(const QuantizeTensor& tensor, const CUtensorMap& map, const Task& task,
                          const uint4* out) {
  const RowPlace<Shape> place;
  const int first = place.warp * Shape::kWarpRows;
  const bool packed = tensor.cu_seqlens != nullptr;
  if (packed && first + Shape::kWarpRows > task.rows) {
    __syncwarp();
    store_some_rows<Shape>(tensor, task, out);
    return;
  }
  cute::tma_store_fence();
  __syncwarp();
  if (place.thread % 32 == 0 && first < task.rows) {
#pragma unroll
    for (int box = 0; box < (Shape::kHeadDim + 127) / 128; ++box) {
      store_box(map, out + box * Shape::kWarpRows * 8, 128 * box, task.memory + first, task.head,
                packed ? 0 : task.sequence);
    }
    cute::tma_store_arrive();
  }
}

// x, scaled to e4m3's range, to memory. of_channels: scales of their own, or null.
template <class Shape>
__device__ void store_row(const QuantizeParams& params, const CUtensorMap& map, const Task& task,
                          typename Shape::Shared& shared, float scale, const float* of_channels,
                          const float (&x)[8][8]) {
  uint4* out = begin_rows<Shape>(shared);
  const RowPlace<Shape> place;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float a[16];
#pragma unroll
    for (int e = 0; e < 16; ++e) a[e] = x[2 * c + e / 8][e % 8];
    if (of_channels != nullptr) {
      const auto* from = reinterpret_cast<const float4*>(of_channels + 8 * place.vector(2 * c));
#pragma unroll
      for (int e = 0; e < 16; e += 4) {
        const float4 of = from[e / 4];
        a[e] *= of.x, a[e + 1] *= of.y, a[e + 2] *= of.z, a[e + 3] *= of.w;
      }
    } else {
#pragma unroll
      for (float& value : a) value *= scale;
    }
    out[chunk_place<Shape>(place.warp_row, 4 * place.part + c)] = {
        to_e4m3x4(a[0], a[1], a[2], a[3]), to_e4m3x4(a[4], a[5], a[6], a[7]),
        to_e4m3x4(a[8], a[9], a[10], a[11]), to_e4m3x4(a[12], a[13], a[14], a[15])};
  }
  send_rows<Shape>(params.tensors[task.which], map, task, out);
}

// The rows of the n-th task after rotary embedding, signs, Hadamard and the subtraction of K's
// mean; returns the factor that they still lack.
template <class Shape>
__device__ float transformed(const QuantizeParams& params, typename Shape::Shared& shared, int n,
                             float (&x)[8][8]) {
  load_row<Shape>(params, shared.slot(n).task, shared.stage(n), shared.signs, x);
  shared.release_stage(n);
  float factor = 1.0f;
  if constexpr (Shape::kMixes) return factor;  // only v comes here
  if (params.hadamard_log2 > 0 && shared.slot(n).task.which != kV) {
    hadamard<Shape>(x, params.hadamard_log2);
    factor = params.hadamard_scale;
  }
  if (params.smooth_k && shared.slot(n).task.subtracts_mean(params)) {
    multiply(x, factor);
    factor = 1.0f;
    const typename Shape::Slot& slot = shared.slot(n);
    subtract_mean<Shape>(slot.values, x);
    if (slot.task.rows < kQuantizeTokens) clear_unless(RowPlace<Shape>{}.row < slot.task.rows, x);
  }
  return factor;
}

// What a pass does with a tile of rows: measures or writes it, after the transforms. Where kMixes
// that is v alone.
template <class Shape>
__device__ void take_rows(const QuantizeParams& params, const QuantizeMaps& maps,
                          typename Shape::Shared& shared, int n) {
  const bool of_v_token = shared.slot(n).task.measures_head(params);
  bool v_infinite = false;
  float v_inverse = 1.0f;
  if (of_v_token) {
    v_inverse = find_token_scale<Shape>(params, shared.slot(n), shared.stage(n), &v_infinite);
  }
  float x[8][8];
  float scale = transformed<Shape>(params, shared, n, x);
  typename Shape::Slot& slot = shared.slot(n);
  const QuantizeTensor& tensor = params.tensors[slot.task.which];
  const bool by_channel = tensor.scale == ScaleKind::kChannel;
  if (of_v_token) {
    if (v_infinite) hide_infinities(x);
    scale *= v_inverse;
  } else if (Shape::kMixes || slot.task.given_scale(tensor)) {
    if (slot.given_infinite) hide_infinities(x);
    if (!by_channel) scale *= slot.inverse;
  } else {
    bool infinite;
    const float amax = largest_finite(x, &infinite) * scale;
    if (slot.task.pass == QuantizePass::kAmax) {
      const RowPlace<Shape> place;
      const std::uint32_t of_warp = warp_largest(amax);
      if (place.thread % 32 == 0) slot.result[place.warp] = __uint_as_float(of_warp);
      if (infinite) slot.infinite = 1;
      return;
    }
    scale *= own_scale<Shape>(params, slot, amax);
  }
  store_row<Shape>(params, maps.out[slot.task.which], slot.task, shared, scale,
                   by_channel ? slot.values : nullptr, x);
}

}  // namespace hopper_attention
