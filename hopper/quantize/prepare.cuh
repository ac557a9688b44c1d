// What comes before the quantizer's kernel: zeros in the workspace, and the mean of K that is
// subtracted where K is smoothed. One kernel streams K, each block of threads 128 tokens of
// neighbouring heads, and stores its sums; another one adds those up, always in the same order.
//
// A lane has 8 channels, and a warp 256 channels of a token, or as many as whole heads fill. Warps
// take the tokens in turn.
#pragma once

#include "common/chain.h"
#include "quantize/load.cuh"
#include "quantize/transform.cuh"

namespace hopper_attention {

// So that eight blocks share a multiprocessor, whose loads come and end at different times.
inline constexpr int kSumThreads = 128, kSumWarps = kSumThreads / 32;
inline constexpr int kSumAhead = 12;  // vectors of a lane that are under way
inline constexpr int kMeanThreads = 512;

__device__ inline void clear(const QuantizeParams& params) {
  auto* to = reinterpret_cast<uint4*>(params.zeros);
#pragma unroll 1
  for (std::int64_t i = std::int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
       i < params.num_zeros / 4; i += std::int64_t{gridDim.x} * kSumThreads) {
    to[i] = {};
  }
}

// Of K's heads, whose channels are a block's.
struct HeadsOfBlock {
  int count;   // of heads
  int groups;  // of so many

  __host__ __device__ explicit HeadsOfBlock(const QuantizeTensor& k)
      : count(256 / k.head_dim), groups((k.heads + count - 1) / count) {}
};

struct SumPlace {
  Task task;    // head: this lane's
  int vector;   // this lane's, of 8 channels
  int vectors;  // of a head
  bool exists;  // whether there is such a head
  const std::uint16_t* from;

  __device__ SumPlace(const QuantizeTensor& k, int block) {
    const HeadsOfBlock heads(k);
    const int tile = block / heads.groups;
    task = {};
    task.which = kK;
    task.sequence = tile / k.slots;
    task.slot = tile - task.sequence * k.slots;
    locate(k, task);
    vectors = k.head_dim / 8;
    const int lane = threadIdx.x % 32, of_block = lane / vectors;
    vector = lane - of_block * vectors;
    task.head = (block - tile * heads.groups) * heads.count + of_block;
    exists = of_block < heads.count && task.head < k.heads;
    from = static_cast<const std::uint16_t*>(k.in) + task.head * k.in_stride_head +
           task.memory * k.in_stride_seq + 8 * vector;
    if (k.cu_seqlens == nullptr) from += task.sequence * k.in_stride_batch;
  }
};

// The same number; what follows from it is worked out from here on, and not kept before.
__device__ inline int hidden(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// 8 elements.
__device__ inline uint4 load_elements(const std::uint16_t* from) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = __ldg(from + 2 * w) | __ldg(from + 2 * w + 1) << 16;
  return {words[0], words[1], words[2], words[3]};
}

// Lines that leave L2 first.
__device__ inline std::uint64_t evict_first() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 8 elements that are aligned, to shared memory; they come while this thread goes on.
__device__ inline void copy_vector(uint4* to, const std::uint16_t* from, std::uint64_t policy) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from), "l"(policy)
               : "memory");
}

template <class Element>
__device__ void add_vector(const uint4& vector, float (&sum)[8]) {
  float x[8];
  unpack<Element>(vector, x);
#pragma unroll
  for (int e = 0; e < 8; ++e) sum[e] += x[e];
}

// The rows of K that a warp adds up, one in kSumWarps, from the first.
struct SumRows {
  const std::uint16_t* from;
  std::int64_t stride;
  int count;

  __device__ SumRows(const SumPlace& place, std::int64_t stride_seq) {
    const int warp = threadIdx.x / 32;
    from = place.from + warp * stride_seq;
    stride = kSumWarps * stride_seq;
    count = place.exists ? (place.task.rows - warp + kSumWarps - 1) / kSumWarps : 0;
  }
};

// Sums of K as it came. Its vectors come by way of shared memory, where each lane has room for its
// own: more of them are under way than registers could take, and one is asked for as soon as one
// was added.
template <class Element>
__device__ void sum_aligned(SumRows rows, uint4 (*own)[32], float (&sum)[8]) {
  own += threadIdx.x / 32 * kSumAhead;
  const int lane = threadIdx.x % 32;
  const std::uint64_t policy = evict_first();  // 1 to 4% of a smoothed K's time
  const auto ask = [&](int row, int at) {
    if (row < rows.count) copy_vector(&own[at][lane], rows.from, policy);
    asm volatile("cp.async.commit_group;" : : : "memory");
    rows.from += rows.stride;
  };
#pragma unroll 1
  for (int row = 0; row < kSumAhead; ++row) ask(row, row);
  int at = 0;
#pragma unroll 4
  for (int row = 0; row < rows.count; ++row) {
    asm volatile("cp.async.wait_group %0;" : : "n"(kSumAhead - 1) : "memory");
    add_vector<Element>(own[at][lane], sum);
    ask(row + kSumAhead, at);
    at = at + 1 == kSumAhead ? 0 : at + 1;
  }
  __syncwarp();
}

// The same, where vectors are not aligned.
template <class Element>
__device__ void sum_unaligned(SumRows rows, float (&sum)[8]) {
#pragma unroll 1
  for (int row = 0; row < rows.count; ++row, rows.from += rows.stride) {
    add_vector<Element>(load_elements(rows.from), sum);
  }
  __syncwarp();
}

// A row in shared memory.
struct OwnRow {
  const uint4* row;
  __device__ const uint4* operator()(int vector) const { return row + vector; }
};

// Whether what a Hadamard transform mixes with this vector has a number that is not finite.
template <class Element>
__device__ bool spoiled(const QuantizeParams& params, int position, const OwnRow& row, int vector) {
  const int mixed = params.hadamard_log2 > 3 ? 1 << (params.hadamard_log2 - 3) : 1;  // vectors
  bool found = false;
#pragma unroll 1
  for (int m = 0; m < mixed; ++m) {
    float x[8];
    load_rotated<Element>(params.rotary, position, row, vector / mixed * mixed + m, x);
#pragma unroll
    for (float value : x) found |= !(fabsf(value) < INFINITY);
  }
  return found;
}

// Sums after rotary embedding; where only_finite, without what would not be finite after the
// Hadamard transform. own_row: room for a warp's row.
template <class Element>
__device__ void sum_rotated(const QuantizeParams& params, const SumPlace& place, bool only_finite,
                            uint4* own_row, float (&sum)[8]) {
  const int lane = threadIdx.x % 32;
  const std::int64_t stride = params.tensors[kK].in_stride_seq;
  const OwnRow row_of_head{own_row + lane - place.vector};
#pragma unroll
  for (float& value : sum) value = 0.0f;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < place.task.rows; row += kSumWarps) {
    const int position = rotary_position(params, place.task, row);
    __syncwarp();
    own_row[lane] = place.exists ? load_elements(place.from + row * stride) : uint4{};
    __syncwarp();
    if (!place.exists) continue;
    float x[8];
    load_rotated<Element>(params.rotary, position, row_of_head, place.vector, x);
    if (only_finite) {
      const bool mixes = params.hadamard_log2 > 0;
      if (mixes && spoiled<Element>(params, position, row_of_head, place.vector)) continue;
#pragma unroll
      for (float& value : x) value = fabsf(value) < INFINITY ? value : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += x[e];
  }
  __syncwarp();
}

// Whether any thread of the block has a number that is not finite.
__device__ inline bool any_infinite(const float (&sum)[8]) {
  bool finite = true;
#pragma unroll
  for (float value : sum) finite &= fabsf(value) < INFINITY;
  return __syncthreads_or(!finite) != 0;
}

// K's sums over 128 tokens, before signs and Hadamard, which are taken of their mean: both are
// linear. Zeros are cleared on the way.
template <class Element>
__global__ void __launch_bounds__(kSumThreads, 8)
    sum_kernel(const __grid_constant__ QuantizeParams params) {
  __shared__ uint4 vectors[kSumWarps * kSumAhead][32];
  auto& of_warps = reinterpret_cast<float4(&)[kSumWarps][64]>(vectors);
  wait_for_last_kernel();
  let_next_start();
  clear(params);
  const QuantizeTensor& k = params.tensors[kK];
  const int block = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum[8] = {};
  bool only_finite = params.rotary.dim == 0, again = !only_finite;
  if (only_finite) {
    const SumPlace place(k, block);
    const SumRows rows(place, k.in_stride_seq);
    if (k.aligned) {
      sum_aligned<Element>(rows, vectors, sum);
    } else {
      sum_unaligned<Element>(rows, sum);
    }
    again = any_infinite(sum);
  }
  while (again) {
    sum_rotated<Element>(params, SumPlace(k, hidden(block)), only_finite,
                         reinterpret_cast<uint4*>(of_warps[warp]), sum);
    again = any_infinite(sum) && !only_finite;
    only_finite = true;
  }
  float4* to = of_warps[warp] + 2 * lane;
  to[0] = {sum[0], sum[1], sum[2], sum[3]};
  to[1] = {sum[4], sum[5], sum[6], sum[7]};
  __syncthreads();
  const SumPlace place(k, hidden(block));
  Task task = place.task;
  const int first_head = task.head - lane / place.vectors;
#pragma unroll
  for (int c = threadIdx.x; c < 256; c += kSumThreads) {
    float all = 0.0f;
#pragma unroll
    for (auto& of_warp : of_warps) all += reinterpret_cast<const float*>(of_warp)[c];
    const int of_block = c / k.head_dim, channel = c - of_block * k.head_dim;
    task.head = first_head + of_block;
    if (of_block >= HeadsOfBlock(k).count || task.head >= k.heads) break;
    params.k_partial[(task.dense_group(k) * k.slots + task.slot) * k.head_dim + channel] = all;
  }
}

// Where a head of a sequence has its blocks of tokens.
struct HeadBlocks {
  std::int64_t first;  // (head, slot)
  int count, seqlen;

  __device__ HeadBlocks(const QuantizeTensor& k, int group) {
    seqlen = k.seqlen;
    first = static_cast<std::int64_t>(group) * k.slots;
    if (k.cu_seqlens != nullptr) {
      const int sequence = group / k.heads, head = group - sequence * k.heads;
      // As locate_packed has it.
      const int begin = min(max(__ldg(k.cu_seqlens + sequence), 0), k.seqlen);
      const int end = min(max(__ldg(k.cu_seqlens + sequence + 1), begin), k.seqlen);
      seqlen = end - begin;
      first = static_cast<std::int64_t>(head) * k.slots + first_slot(begin, sequence);
    }
    count = (seqlen + kQuantizeTokens - 1) / kQuantizeTokens;
  }
};

// From the mean of K as it came to that of K as it is quantized.
__device__ inline void rotate_mean(const QuantizeParams& params, int head_dim, float* mean) {
  const int c = threadIdx.x;
  if (c < head_dim && (params.sign_bits[c / 32] >> c % 32 & 1)) mean[c] = -mean[c];
#pragma unroll 1
  for (int stage = 0; stage < params.hadamard_log2; ++stage) {
    const int stride = 1 << stage, first = 2 * c - (c & (stride - 1));
    __syncthreads();
    if (c < head_dim / 2) butterfly(mean[first], mean[first + stride]);
  }
  __syncthreads();
}

// The mean of a head of a sequence: a thread has two channels of every `parts`-th block of tokens.
__global__ void __launch_bounds__(kMeanThreads, 2)
    mean_kernel(const __grid_constant__ QuantizeParams params) {
  __shared__ double2 of_parts[kMeanThreads];
  __shared__ float mean[256];
  let_next_start();
  wait_for_last_kernel();
  const QuantizeTensor& k = params.tensors[kK];
  const HeadBlocks blocks(k, blockIdx.x);
  const int columns = k.head_dim / 2, parts = min(kMeanThreads / columns, 16);
  const int part = threadIdx.x / columns, column = threadIdx.x - part * columns;
  double2 sum{};
  if (part < parts) {
    const float* from = params.k_partial + blocks.first * k.head_dim + 2 * column;
#pragma unroll 8
    for (int n = part; n < blocks.count; n += parts) {
      const std::int64_t at = static_cast<std::int64_t>(n) * k.head_dim;
      const float2 x = __ldcg(reinterpret_cast<const float2*>(from + at));
      sum.x += x.x, sum.y += x.y;
    }
    of_parts[threadIdx.x] = sum;
  }
  __syncthreads();
  if (part == 0) {
#pragma unroll 1
    for (int other = 1; other < parts; ++other) {
      const double2 x = of_parts[other * columns + column];
      sum.x += x.x, sum.y += x.y;
    }
    const double tokens = max(blocks.seqlen, 1);
    mean[2 * column] = static_cast<float>(sum.x / tokens);
    mean[2 * column + 1] = static_cast<float>(sum.y / tokens);
  }
  __syncthreads();
  if (params.hadamard_log2 > 0) rotate_mean(params, k.head_dim, mean);
  const int c = threadIdx.x;
  if (c >= k.head_dim) return;
  const float value = params.hadamard_log2 > 0 ? mean[c] * params.hadamard_scale : mean[c];
  // Where the sum overflows, K stays as it is.
  params.k_mean[static_cast<std::int64_t>(blockIdx.x) * k.head_dim + c] =
      fabsf(value) < INFINITY ? value : 0.0f;
}

}  // namespace hopper_attention
