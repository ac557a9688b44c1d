// Lists the key blocks of a packed batch: one thread block, which counts those of each group and
// cost, adds the counts up, and puts every key block into its place (a counting sort).
#pragma once

#include "backward/params.h"
#include "common/prefix_sum.cuh"

namespace hopper_attention {

inline constexpr int kListCounters = kMaxSequenceGroups * kCostBuckets;

struct KeyListJob {
  KeyList list;
  Mask mask;
  int tile_m;
  int entry_keys;  // of a block, or of all blocks of a cluster
  // Blocks of one sequence follow one another, the last one first: each waits for those ahead of
  // it. Otherwise the longest come first.
  bool ordered;
};

// Takes a place in the list for each key block, and with kWrite writes it there. A warp takes up to
// 32 sequences, whose lengths its lanes read at once, and for each in turn a lane a block.
template <int kThreads, bool kWrite>
__device__ void place_key_blocks(const KeyListJob& job, int* place_of) {
  constexpr unsigned kAll = 0xffffffff;
  constexpr int kWarps = kThreads / 32;
  const KeyList& list = job.list;
  const int sequences = list.lengths.batch + 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = min((sequences + kWarps - 1) / kWarps, 32);
  for (int first = warp * share; first < sequences; first += kWarps * share) {
    const int count = min(share, sequences - first);
    const Sequence mine = sequence_at(list.lengths, first + min(lane, count - 1));
    for (int i = 0; i < count; ++i) {
      KeyEntry entry{};
      entry.q_begin = __shfl_sync(kAll, mine.q_begin, i);
      entry.first_block = first_query_block(entry.q_begin, first + i, job.tile_m);
      entry.seqlen_q = __shfl_sync(kAll, mine.seqlen_q, i);
      entry.k_begin = __shfl_sync(kAll, mine.k_begin, i);
      entry.seqlen_k = __shfl_sync(kAll, mine.seqlen_k, i);
      entry.keys = __shfl_sync(kAll, mine.keys, i);
      const Mask mask = sequence_mask(job.mask, entry.seqlen_q, entry.seqlen_k);
      const int n_blocks = entry.keys / job.entry_keys + (entry.keys % job.entry_keys > 0);
      int* const slots = place_of + list.order.group_of(entry.q_begin) * kCostBuckets;
      int last = 0;
      if (job.ordered) {
        if (lane == 0) {
          int* const slot = &slots[kCostBuckets - 1 - cost_bucket(n_blocks)];
          last = atomicAdd(slot, n_blocks) + n_blocks - 1;
        }
        last = __shfl_sync(kAll, last, 0);
      }
      for (int n_block = lane; n_block < n_blocks; n_block += 32) {
        int place = last - n_block;
        if (!job.ordered) {
          const BlockRange m_blocks = tile_query_blocks(mask, n_block, job.tile_m, job.entry_keys);
          const int bucket = cost_bucket(m_blocks.empty() ? 0 : m_blocks.end - m_blocks.begin);
          place = atomicAdd(&slots[kCostBuckets - 1 - bucket], 1);
        }
        if constexpr (kWrite) {
          entry.n_block = n_block;
          if (place < list.max_entries) list.entries[place] = entry;
        }
      }
    }
  }
}

// Whether cu_seqlens are sums of lengths within the tensors.
template <int kThreads>
__device__ bool lengths_make_sense(const PackedLengths& lengths) {
  bool wrong = false;
  for (int i = threadIdx.x; i <= lengths.batch; i += kThreads) {
    const int q = lengths.cu_seqlens_q[i], k = lengths.cu_seqlens_k[i];
    const int last_q = i == 0 ? 0 : lengths.cu_seqlens_q[i - 1];
    const int last_k = i == 0 ? 0 : lengths.cu_seqlens_k[i - 1];
    wrong |= q < last_q || k < last_k || q > lengths.total_q || k > lengths.total_k;
  }
  return !__syncthreads_or(wrong);
}

// place_of: kListCounters numbers of shared memory. An empty list where lengths make no sense: in a
// fixed order key blocks would wait for each other forever.
template <int kThreads>
__device__ void list_key_blocks(const KeyListJob& job, int* place_of) {
  const int groups = job.list.order.num_groups, counters = groups * kCostBuckets;
  for (int i = threadIdx.x; i < counters; i += kThreads) place_of[i] = 0;
  const bool valid = lengths_make_sense<kThreads>(job.list.lengths);
  if (valid) {
    place_key_blocks<kThreads, false>(job, place_of);
    __syncthreads();
    add_up<kThreads>(place_of, counters);
    __syncthreads();
    place_key_blocks<kThreads, true>(job, place_of);
    __syncthreads();
  }
  // A slot's last place is the next one's first by now.
  if (threadIdx.x < groups) {
    const int end = valid ? place_of[(threadIdx.x + 1) * kCostBuckets - 1] : 0;
    job.list.header->group_end[threadIdx.x] = min(end, job.list.max_entries);
  }
}

}  // namespace hopper_attention
