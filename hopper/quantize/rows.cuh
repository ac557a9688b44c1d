// Tiles whose rows stay rows: q, k, and v where it is not transposed. A thread has 64 channels of a
// row; a warp writes its rows by TMA.
#pragma once

#include "quantize/load.cuh"
#include "quantize/transform.cuh"

namespace hopper_attention {

// Finds the scale of this thread's row where it is the tile's own or the row's; one of those that
// share it writes its descale.
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
    const std::int64_t at = task.dense_group(tensor) * tensor.seqlen + task.memory + place.row;
    if (task.which == kV) {
      params.v_token_factor[at] = token_factor(amax, slot.descale);
    } else {
      tensor.descale[at] = descale_of(amax);
    }
  }
  return inverse_of(amax);
}

template <class Shape>
__device__ void scale_channels(const float* inverse, float (&x)[8][8]) {
  const RowPlace<Shape> place;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto* from = reinterpret_cast<const float4*>(inverse + 8 * place.vector(i));
    const float4 low = from[0], high = from[1];
    x[i][0] *= low.x, x[i][1] *= low.y, x[i][2] *= low.z, x[i][3] *= low.w;
    x[i][4] *= high.x, x[i][5] *= high.y, x[i][6] *= high.z, x[i][7] *= high.w;
  }
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

// x, which fits e4m3's range, to memory.
template <class Shape>
__device__ void store_row(const QuantizeParams& params, const CUtensorMap& map, const Task& task,
                          uint4* team_out, const float (&x)[8][8]) {
  const QuantizeTensor& tensor = params.tensors[task.which];
  const RowPlace<Shape> place;
  uint4* out = team_out + place.warp * 128;
  const bool first_lane = place.thread % 32 == 0;
  if (first_lane) cute::tma_store_wait<0>();  // the last rows have left
  __syncwarp();
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float (&a)[8] = x[2 * c], (&b)[8] = x[2 * c + 1];
    out[chunk_place<Shape>(place.warp_row, 4 * place.part + c)] = {
        to_e4m3x4(a[0], a[1], a[2], a[3]), to_e4m3x4(a[4], a[5], a[6], a[7]),
        to_e4m3x4(b[0], b[1], b[2], b[3]), to_e4m3x4(b[4], b[5], b[6], b[7])};
  }
  const int first = place.warp * Shape::kWarpRows;
  const bool packed = tensor.cu_seqlens != nullptr;
  if (packed && first + Shape::kWarpRows > task.rows) {
    __syncwarp();
    store_some_rows<Shape>(tensor, task, out);
    return;
  }
  cute::tma_store_fence();
  __syncwarp();
  if (first_lane && first < task.rows) {
#pragma unroll
    for (int box = 0; box < (Shape::kHeadDim + 127) / 128; ++box) {
      store_box(map, out + box * Shape::kWarpRows * 8, 128 * box, task.memory + first, task.head,
                packed ? 0 : task.sequence);
    }
    cute::tma_store_arrive();
  }
}

// The rows of the n-th task after rotary embedding, signs, Hadamard and the subtraction of K's
// mean; returns the factor that they still lack.
template <class Shape>
__device__ float transformed(const QuantizeParams& params, typename Shape::Shared& shared, int n,
                             float (&x)[8][8]) {
  load_row<Shape>(params, shared.slot(n).task, shared.stage(n), shared.signs, x);
  shared.release_stage(n);
  float factor = 1.0f;
  if (params.hadamard_log2 > 0 && shared.slot(n).task.which != kV) {
    hadamard<Shape>(x, params.hadamard_log2);
    // A power of two can wait for the scale: what it makes subnormal here becomes 0 in e4m3.
    if (params.hadamard_scale_is_exact && !shared.slot(n).task.subtracts_mean(params)) {
      factor = params.hadamard_scale;
    } else {
      multiply(x, params.hadamard_scale);
    }
  }
  if (params.smooth_k) {
    const typename Shape::Slot& slot = shared.slot(n);
    const bool exists = RowPlace<Shape>{}.row < slot.task.rows;
    if (exists && slot.task.subtracts_mean(params)) subtract_mean<Shape>(slot.values, x);
  }
  return factor;
}

// What a pass does with a tile of rows: measures or writes it, after the transforms.
template <class Shape>
__device__ void take_rows(const QuantizeParams& params, const QuantizeMaps& maps,
                          typename Shape::Shared& shared, int n) {
  float x[8][8];
  const float factor = transformed<Shape>(params, shared, n, x);
  typename Shape::Slot& slot = shared.slot(n);
  const QuantizeTensor& tensor = params.tensors[slot.task.which];
  if (slot.task.given_scale(tensor) && tensor.scale != ScaleKind::kToken) {
    if (slot.given_infinite) hide_infinities(x);
    if (tensor.scale == ScaleKind::kChannel) {
      scale_channels<Shape>(slot.values, x);
    } else {
      multiply(x, slot.inverse * factor);
    }
  } else {
    bool infinite;
    const float amax = largest_finite(x, &infinite) * factor;
    if (slot.task.pass == QuantizePass::kAmax) {
      const RowPlace<Shape> place;
      const std::uint32_t of_warp = warp_largest(amax);
      if (place.thread % 32 == 0) slot.result[place.warp] = __uint_as_float(of_warp);
      if (infinite) slot.infinite = 1;
      return;
    }
    multiply(x, own_scale<Shape>(params, slot, amax) * factor);
  }
  const Task& task = shared.slot(n).task;
  const int team = team_idx<Shape>();
  store_row<Shape>(params, maps.out[task.which], task, shared.out[team], x);
  shared.wrote_rows[team] = true;
}

}  // namespace hopper_attention
