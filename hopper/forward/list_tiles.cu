// Lists the tiles of a packed batch: one block, which counts the tiles of each group and cost, adds
// the counts up, and puts every tile into its place (a counting sort).
#include "common/prefix_sum.cuh"
#include "forward/params.h"

namespace hopper_attention {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = kMaxSequenceGroups * kCostBuckets;
constexpr unsigned kAll = 0xffffffff;

struct Job {
  PackedParams packed;
  Mask mask;
  int tile_m;
  int tile_n;
};

// Calls place(slot, entry) for each tile of the batch but the start's, from all threads. 32
// sequences, whose lengths a warp's lanes read at once, are one warp's, or several warps' while
// there are enough; the lanes then take a tile each, of whichever sequence.
template <class Place>
__device__ void for_tiles(const Job& job, const Place& place) {
  const int sequences = job.packed.lengths.batch + 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunks = (sequences + 31) / 32;
  const int team = max(kWarps / chunks, 1);  // warps that share a chunk
  for (int chunk = warp / team; chunk < chunks; chunk += kWarps / team) {
    const int first = 32 * chunk, count = min(sequences - first, 32);
    const Sequence mine = sequence_at(job.packed.lengths, first + min(lane, count - 1));
    const int tiles = lane < count ? (mine.rows + job.tile_m - 1) / job.tile_m : 0;
    const int tiles_end = sum_up_to_lane(tiles);
    const int total = __shfl_sync(kAll, tiles_end, 31);
    const int batch = job.packed.lengths.batch;
    for (int begin = warp % team * 32; begin < total; begin += team * 32) {
      const int tile = begin + lane;
      int owner = 0;  // the lane with its sequence: as many end before it
      for (int step = 16; step > 0; step /= 2) {
        if (__shfl_sync(kAll, tiles_end, owner + step - 1) <= tile) owner += step;
      }
      const int m_block = tile - __shfl_sync(kAll, tiles_end - tiles, owner);
      const int behind = __shfl_sync(kAll, tiles_end, owner) - 1 - tile;  // of its sequence
      const TileSequence sequence{
          __shfl_sync(kAll, mine.q_begin, owner), __shfl_sync(kAll, mine.rows, owner),
          __shfl_sync(kAll, mine.seqlen_q, owner), __shfl_sync(kAll, mine.seqlen_k, owner)};
      const int k_begin = __shfl_sync(kAll, mine.k_begin, owner);
      const int group = job.packed.order.group_of(k_begin);
      if (tile >= total || job.packed.start.holds(first + owner, behind, group, batch)) continue;
      const Mask mask = sequence_mask(job.mask, sequence.seqlen_q, sequence.seqlen_k);
      const BlockRange blocks = tile_key_blocks(mask, m_block, job.tile_m, job.tile_n);
      const int bucket = cost_bucket(blocks.end - blocks.begin);
      // Costly tiles first.
      place(group * kCostBuckets + kCostBuckets - 1 - bucket,
            TileEntry{m_block, first + owner, k_begin, 0, sequence});
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) list_tiles(const __grid_constant__ Job job) {
  __shared__ int place_of[kSlots + 1];  // and, behind the slots, the number of tiles
  // The forward kernel may begin; it waits for this one's end before it reads.
  asm volatile("griddepcontrol.launch_dependents;");
  const PackedParams& packed = job.packed;
  const int start = packed.start.entries;
  if (threadIdx.x < start) {
    packed.entries[threadIdx.x] =
        start_entry(packed.lengths, packed.order, job.tile_m, threadIdx.x);
  }
  const int slots = packed.order.num_groups * kCostBuckets;
  for (int i = threadIdx.x; i <= slots; i += kThreads) place_of[i] = 0;
  __syncthreads();
  // A thread's last tile: of a short list it is the only one, and need not be found again.
  int tiles = 0, tile_slot = 0, tile_rank = 0;
  TileEntry tile;
  for_tiles(job, [&](int slot, const TileEntry& entry) {
    tile_rank = atomicAdd(&place_of[slot], 1);
    tile_slot = slot;
    tile = entry;
    ++tiles;
  });
  const bool is_long = __syncthreads_or(tiles > 1);
  add_up<kThreads>(place_of, slots + 1);
  __syncthreads();
  if (threadIdx.x < packed.order.num_groups) {
    const int end = place_of[(threadIdx.x + 1) * kCostBuckets];
    packed.header->group_end[threadIdx.x] = min(start + end, packed.max_entries);
  }
  if (threadIdx.x == 0) packed.header->next_tile = 0;
  // Lengths that are no sums of lengths may give more tiles than there is room for.
  const auto put = [&](int place, const TileEntry& entry) {
    if (start + place < packed.max_entries) packed.entries[start + place] = entry;
  };
  if (is_long) {
    __syncthreads();  // the groups' ends are read
    for_tiles(job,
              [&](int slot, const TileEntry& entry) { put(atomicAdd(&place_of[slot], 1), entry); });
  } else if (tiles == 1) {
    put(place_of[tile_slot] + tile_rank, tile);
  }
}

}  // namespace

cudaError_t launch_list_tiles(const PackedParams& packed, const Mask& mask, int tile_m, int tile_n,
                              cudaStream_t stream) {
  list_tiles<<<1, kThreads, 0, stream>>>({packed, mask, tile_m, tile_n});
  return cudaGetLastError();
}

}  // namespace hopper_attention
