// q and k: a row's elements are in neighbouring threads.
#pragma once

#include "quantize/load.cuh"
#include "quantize/transform.cuh"

namespace hopper_attention {

// The scale of this thread's row; its descale is written by one thread of those that share it.
template <class Shape>
__device__ float row_scale(const QuantizeTensor& tensor, const Task& task, float amax,
                           std::uint32_t (&warp_amax)[32]) {
  const RowPlace<Shape> place;
  switch (tensor.scale) {
    case ScaleKind::kBlock: {
      amax = block_largest<Shape>(amax, warp_amax);
      if (place.thread == 0 && task.slot < tensor.slots) {
        tensor.descale[task.dense_group(tensor) * tensor.slots + task.slot] = descale_of(amax);
      }
      break;
    }
    case ScaleKind::kToken: {
      amax = row_largest<Shape>(amax);
      if (place.lane == 0 && place.row < task.rows) {
        tensor.descale[task.dense_group(tensor) * tensor.seqlen + task.memory + place.row] =
            descale_of(amax);
      }
      break;
    }
    default: {
      const std::int64_t group = task.group(tensor);
      const bool whole = tensor.scale == ScaleKind::kTensor;
      amax = __uint_as_float(__ldcg(tensor.amax + (whole ? 0 : group)));
      if (place.thread == 0 && task.first == 0) tensor.descale[group] = descale_of(amax);
    }
  }
  return inverse_of(amax);
}

// Neighbouring threads exchange vectors, so that each has 16 bytes in a row to write.
template <class Shape>
__device__ void store_rows(const QuantizeTensor& tensor, const Task& task, float inverse,
                           const float (&x)[4][8]) {
  const RowPlace<Shape> place;
  const bool odd = place.lane % 2 == 1;
  std::uint8_t* row = tensor.out + task.head * tensor.out_stride_head +
                      (task.memory + place.row) * tensor.out_stride_seq;
  if (tensor.cu_seqlens == nullptr) row += task.sequence * tensor.out_stride_batch;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    std::uint32_t words[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float (&v)[8] = x[i + n];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        words[n][w] = to_e4m3x4(v[4 * w] * inverse, v[4 * w + 1] * inverse, v[4 * w + 2] * inverse,
                                v[4 * w + 3] * inverse);
      }
    }
    uint4 chunk;
    // The even thread keeps the vector of i and gives away that of i + 1, the odd one vice versa.
    const std::uint32_t away0 = odd ? words[0][0] : words[1][0];
    const std::uint32_t away1 = odd ? words[0][1] : words[1][1];
    const std::uint32_t got0 = __shfl_xor_sync(kAllLanes, away0, 1);
    const std::uint32_t got1 = __shfl_xor_sync(kAllLanes, away1, 1);
    chunk.x = odd ? got0 : words[0][0];
    chunk.y = odd ? got1 : words[0][1];
    chunk.z = odd ? words[1][0] : got0;
    chunk.w = odd ? words[1][1] : got1;
    const int vector = (place.lane & ~1) + Shape::kLanes * (i + odd);
    if (place.row < task.rows && 8 * vector < tensor.head_dim) {
      *reinterpret_cast<uint4*>(row + 8 * vector) = chunk;
    }
  }
}

template <class Shape>
__device__ void quantize_rows(const QuantizeParams& params, const Task& task,
                              typename Shape::Shared& shared, int stage, float (&x)[4][8]) {
  const QuantizeTensor& tensor = params.tensors[task.which];
  if (params.hadamard_log2 > 0) hadamard<Shape>(x, params.hadamard_log2, params.hadamard_scale);
  if (params.subtract_k_mean && task.which == kK) subtract_mean<Shape>(params, task, x);
  const float amax = largest_finite(x);
  const float inverse = row_scale<Shape>(tensor, task, amax, shared.warp_amax[stage]);
  store_rows<Shape>(tensor, task, inverse, x);
}

// Adds up k's rows in pairs, then pairs of pairs and so on: the order settles the mean's rounding.
// What is not finite counts as 0.
template <class Shape>
__device__ void sum_rows(const QuantizeParams& params, const Task& task,
                         typename Shape::Shared& shared, float (&x)[4][8]) {
  const QuantizeTensor& k = params.tensors[kK];
  const RowPlace<Shape> place;
  auto* sums = reinterpret_cast<float (*)[Shape::kHeadDim]>(shared.words);  // a row a warp
  __syncthreads();  // the task before may still be read
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float sum = fabsf(x[i][e]) < INFINITY ? x[i][e] : 0.0f;
#pragma unroll
      for (int step = Shape::kLanes; step < 32; step *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, step);
      }
      if (place.thread % 32 < Shape::kLanes) {
        sums[place.thread / 32][8 * place.vector(i) + e] = sum;
      }
    }
  }
  for (int step = 1; step < Shape::kWarps; step *= 2) {
    __syncthreads();
    for (int at = place.thread; at < Shape::kHeadDim * Shape::kWarps / (2 * step);
         at += Shape::kThreads) {
      const int warp = at / Shape::kHeadDim * 2 * step, channel = at % Shape::kHeadDim;
      sums[warp][channel] += sums[warp + step][channel];
    }
  }
  __syncthreads();
  if (place.thread < k.head_dim && task.slot < k.slots) {
    float* to = params.k_partial + (task.dense_group(k) * k.slots + task.slot) * k.head_dim;
    to[place.thread] = sums[0][place.thread];
  }
}

template <class Shape>
__device__ void measure_rows(const QuantizeParams& params, const Task& task,
                             typename Shape::Shared& shared, float (&x)[4][8]) {
  const QuantizeTensor& tensor = params.tensors[task.which];
  if (params.hadamard_log2 > 0) hadamard<Shape>(x, params.hadamard_log2, params.hadamard_scale);
  if (params.sum_k && task.which == kK) sum_rows<Shape>(params, task, shared, x);
  if (!tensor.find_amax) return;
  if (params.subtract_k_mean && task.which == kK) subtract_mean<Shape>(params, task, x);
  const std::uint32_t amax = warp_largest(largest_finite(x));
  if (thread_idx() % 32 == 0) {
    raise(tensor.amax + (tensor.scale == ScaleKind::kTensor ? 0 : task.group(tensor)), amax);
  }
}

}  // namespace hopper_attention
