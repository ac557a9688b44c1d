// Lists the tiles of a packed batch: one block, which counts the tiles of each group and cost, adds
// the counts up, and puts every tile into its place (a counting sort).
#include "forward/params.h"

namespace hopper_attention {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kCounters = kMaxSequenceGroups * kCostBuckets;
constexpr unsigned kAll = 0xffffffff;

struct Job {
  PackedParams packed;
  Mask mask;
  int tile_m;
  int tile_n;
};

// Calls place(slot, entry) for each tile of the batch, from all threads. A warp takes up to 32
// sequences, whose lengths its lanes read at once, and for each in turn a lane a tile.
template <class Place>
__device__ void for_tiles(const Job& job, const Place& place) {
  const int sequences = job.packed.lengths.batch + 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = min((sequences + kWarps - 1) / kWarps, 32);
  for (int first = warp * share; first < sequences; first += kWarps * share) {
    const int count = min(share, sequences - first);
    const Sequence mine = sequence_at(job.packed.lengths, first + min(lane, count - 1));
    for (int i = 0; i < count; ++i) {
      const TileSequence sequence{
          __shfl_sync(kAll, mine.q_begin, i), __shfl_sync(kAll, mine.rows, i),
          __shfl_sync(kAll, mine.seqlen_q, i), __shfl_sync(kAll, mine.seqlen_k, i)};
      const int k_begin = __shfl_sync(kAll, mine.k_begin, i);
      const Mask mask = sequence_mask(job.mask, sequence.seqlen_q, sequence.seqlen_k);
      const int group = job.packed.order.group_of(k_begin);
      for (int m_block = lane; m_block * job.tile_m < sequence.rows; m_block += 32) {
        const BlockRange blocks = tile_key_blocks(mask, m_block, job.tile_m, job.tile_n);
        const int bucket = cost_bucket(blocks.end - blocks.begin);
        // Costly tiles first.
        place(group * kCostBuckets + kCostBuckets - 1 - bucket,
              TileEntry{m_block, first + i, k_begin, 0, sequence});
      }
    }
  }
}

// Replaces count[0] to count[size - 1] by the sums of those before them; all threads call it.
__device__ void add_up(int* count, int size) {
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = (size + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * share, size);
  const int end = min(begin + share, size);
  int own = 0;
  for (int i = begin; i < end; ++i) own += count[i];
  int sum = own;  // of this warp's lanes up to this one
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  sum -= own;
  for (int i = 0; i < warp; ++i) sum += warp_sums[i];
  for (int i = begin; i < end; ++i) {
    const int next = sum + count[i];
    count[i] = sum;
    sum = next;
  }
}

__global__ void __launch_bounds__(kThreads, 1) list_tiles(const __grid_constant__ Job job) {
  __shared__ int place_of[kCounters];
  // The forward kernel may start to set itself up; it waits for this one's end before it reads.
  asm volatile("griddepcontrol.launch_dependents;");
  const PackedParams& packed = job.packed;
  const int counters = packed.order.num_groups * kCostBuckets;
  for (int i = threadIdx.x; i < counters; i += kThreads) place_of[i] = 0;
  __syncthreads();
  for_tiles(job, [&](int slot, const TileEntry&) { atomicAdd(&place_of[slot], 1); });
  __syncthreads();
  add_up(place_of, counters);
  __syncthreads();
  // Lengths that are no sums of lengths may give more tiles than there is room for.
  for_tiles(job, [&](int slot, const TileEntry& entry) {
    const int place = atomicAdd(&place_of[slot], 1);
    if (place < packed.max_entries) packed.entries[place] = entry;
  });
  __syncthreads();
  // A slot's last place is the next one's first by now.
  if (threadIdx.x < packed.order.num_groups) {
    const int end = place_of[(threadIdx.x + 1) * kCostBuckets - 1];
    packed.header->group_end[threadIdx.x] = min(end, packed.max_entries);
  }
  if (threadIdx.x == 0) packed.header->next_tile = 0;
}

}  // namespace

cudaError_t launch_list_tiles(const PackedParams& packed, const Mask& mask, int tile_m, int tile_n,
                              cudaStream_t stream) {
  list_tiles<<<1, kThreads, 0, stream>>>({packed, mask, tile_m, tile_n});
  return cudaGetLastError();
}

}  // namespace hopper_attention
