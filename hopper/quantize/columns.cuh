// v: a thread has 8 channels of four tokens that are neighbours in the transposed layout.
#pragma once

#include "quantize/load.cuh"
#include "quantize/transform.cuh"

namespace hopper_attention {

template <class Shape>
__device__ void measure_columns(const QuantizeParams& params, const Task& task, float (&x)[4][8]) {
  const QuantizeTensor& v = params.tensors[kV];
  const ColumnPlace<Shape> place;
  const float amax = largest_finite(x);
  if (v.scale != ScaleKind::kChannel) {
    const std::uint32_t bits = warp_largest(amax);
    if (place.thread % 32 == 0) {
      raise(v.amax + (v.scale == ScaleKind::kTensor ? 0 : task.group(v)), bits);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    float of_channel =
        fmaxf(fmaxf(fabsf(x[0][e]), fabsf(x[1][e])), fmaxf(fabsf(x[2][e]), fabsf(x[3][e])));
    of_channel = fmaxf(of_channel, __shfl_xor_sync(kAllLanes, of_channel, 8));
    of_channel = fmaxf(of_channel, __shfl_xor_sync(kAllLanes, of_channel, 16));
    x[0][e] = fmaxf(of_channel, 0.0f);  // where all are NaN
  }
  if (place.thread % 32 < 8 && 8 * place.vector < v.head_dim) {
    std::uint32_t* to = v.amax + task.group(v) * v.head_dim + 8 * place.vector;
#pragma unroll
    for (int e = 0; e < 8; ++e) raise(to + e, __float_as_uint(x[0][e]));
  }
}

// The scales of v, which channels have or all share, to shared memory; writes the descales once.
template <class Shape>
__device__ void find_channel_scales(const QuantizeTensor& v, const Task& task,
                                    float (&inverse)[Shape::kHeadDim]) {
  if (const int channel = thread_idx(); channel < Shape::kHeadDim) {
    const bool own = v.scale == ScaleKind::kChannel;
    const std::int64_t at = own ? task.group(v) * v.head_dim + channel : task.group(v);
    const bool exists = channel < v.head_dim;
    const std::int64_t from = v.scale == ScaleKind::kTensor ? 0 : at;
    const float amax = exists ? __uint_as_float(__ldcg(v.amax + from)) : 0.0f;
    inverse[channel] = inverse_of(amax);
    if (exists && task.first == 0 && (own || channel == 0)) v.descale[at] = descale_of(amax);
  }
  __syncthreads();
}

template <class Shape>
__device__ void scale_channels(const float (&inverse)[Shape::kHeadDim], float (&x)[4][8]) {
  const ColumnPlace<Shape> place;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float factor = inverse[8 * place.vector + e];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i][e] *= factor;
  }
}

// Largest |v| of each token, over the threads that share it; then its factor is written.
template <class Shape>
__device__ void scale_tokens(const QuantizeParams& params, const Task& task,
                             std::uint32_t (&row_amax)[kQuantizeTokens], float (&x)[4][8]) {
  const QuantizeTensor& v = params.tensors[kV];
  const ColumnPlace<Shape> place;
  if (place.thread < kQuantizeTokens) row_amax[place.thread] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float amax = 0.0f;
#pragma unroll
    for (float value : x[i]) amax = fmaxf(amax, fabsf(value));
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, step));
    }
    if (place.thread % 8 == 0) atomicMax(row_amax + place.row(i), __float_as_uint(amax));
  }
  __syncthreads();
  if (const int row = thread_idx(); row < kQuantizeTokens) {
    const std::int64_t group = task.group(v);
    const float amax = __uint_as_float(row_amax[row]);
    const float of_head = descale_of(__uint_as_float(__ldcg(v.amax + group)));
    if (row == 0 && task.first == 0) v.descale[group] = of_head;
    if (row < task.rows) {
      // A token of zeros takes any factor.
      const float factor = amax > 0.0f ? descale_of(amax) / of_head : 1.0f;
      params.v_token_factor[task.dense_group(v) * v.seqlen + task.memory + row] =
          fmaxf(factor, 0x1p-126f);
    }
    row_amax[row] = __float_as_uint(inverse_of(amax));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float inverse = __uint_as_float(row_amax[place.row(i)]);
#pragma unroll
    for (float& value : x[i]) value *= inverse;
  }
  __syncthreads();  // before the next task clears row_amax
}

// Rows as they came; the places up to the next multiple of 16 channels become 0.
template <class Shape>
__device__ void store_columns(const QuantizeTensor& v, const Task& task, const float (&x)[4][8]) {
  const ColumnPlace<Shape> place;
  std::uint8_t* out = v.out + task.head * v.out_stride_head + 8 * place.vector;
  if (v.cu_seqlens == nullptr) out += task.sequence * v.out_stride_batch;
  if (8 * place.vector >= static_cast<int>(round_up(v.head_dim, 16))) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = place.row(i);
    if (row >= task.rows) continue;
    const uint2 bytes = {to_e4m3x4(x[i][0], x[i][1], x[i][2], x[i][3]),
                         to_e4m3x4(x[i][4], x[i][5], x[i][6], x[i][7])};
    *reinterpret_cast<uint2*>(out + (task.memory + row) * v.out_stride_seq) = bytes;
  }
}

// Through shared memory to channels of 128 tokens. A channel's chunks of 16 tokens are permuted by
// its number, so that neither the writes nor the reads meet in a bank.
template <class Shape>
__device__ void store_transposed(const QuantizeTensor& v, const Task& task,
                                 std::uint32_t (&words)[Shape::kHeadDim * 32],
                                 const float (&x)[4][8]) {
  const ColumnPlace<Shape> place;
  const int column = 4 * (place.group ^ (place.vector % 8)) + place.quad;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    words[(8 * place.vector + e) * 32 + column] = to_e4m3x4(x[0][e], x[1][e], x[2][e], x[3][e]);
  }
  __syncthreads();
  if (task.slot >= v.slots) return;
  std::uint8_t* out = v.out + task.head * v.out_stride_head +
                      static_cast<std::int64_t>(task.slot) * kQuantizeTokens;
  if (v.cu_seqlens == nullptr) out += task.sequence * v.out_stride_batch;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int at = place.thread + n * Shape::kThreads;
    const int channel = at / 8, chunk = at % 8;
    if (channel >= v.head_dim) break;
    *reinterpret_cast<uint4*>(out + channel * v.out_stride_seq + 16 * chunk) =
        *reinterpret_cast<const uint4*>(words + 32 * channel + 4 * (chunk ^ (channel / 8 % 8)));
  }
}

// Elements are loaded after the divisions where that is possible, which need registers.
template <class Shape>
__device__ void quantize_columns(const QuantizeParams& params, const Task& task,
                                 typename Shape::Shared& shared, int stage, float (&x)[4][8]) {
  const QuantizeTensor& v = params.tensors[kV];
  if (v.scale == ScaleKind::kToken) {
    load_columns<Shape>(shared.stages[stage], x);
    largest_finite(x);
    scale_tokens<Shape>(params, task, shared.row_amax, x);
  } else {
    find_channel_scales<Shape>(v, task, shared.inverse);
    load_columns<Shape>(shared.stages[stage], x);
    largest_finite(x);
    scale_channels<Shape>(shared.inverse, x);
  }
  if (params.v_transposed) {
    store_transposed<Shape>(v, task, shared.words, x);
  } else {
    store_columns<Shape>(v, task, x);
    __syncthreads();  // the next task overwrites the scales
  }
}

}  // namespace hopper_attention
