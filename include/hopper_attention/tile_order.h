// In which order the persistent grid works through the tiles: work index -> (block, head, batch).
#pragma once

#include <cstdint>

#include "hopper_attention/mask.h"

namespace hopper_attention {

struct WorkTile {
  int m_block;
  int head;
  int batch;
};

// Heads are taken in groups, one group after the other: `in_smaller` of them in groups of
// `smaller`, then the rest in groups of `size`. The smaller ones come first, as the last group
// fills the gaps that the end of the one before leaves.
struct HeadGroups {
  int size;  // 1 or more
  int smaller;
  int in_smaller;  // heads, 0 where all groups are equal

  struct Place {
    int first_head;  // the group's
    int heads;       // the group's
    int within;      // the tile, counted from the group's first
  };

  // The work_idx-th tile, where each head has `tiles`.
  HOPPER_ATTENTION_HD constexpr Place operator()(int work_idx, int tiles) const {
    const int first_tiles = in_smaller * tiles;
    const bool first = work_idx < first_tiles;
    const int heads = first ? smaller : size;
    const int idx = first ? work_idx : work_idx - first_tiles;
    const int group_tiles = heads * tiles;
    return {(first ? 0 : in_smaller) + idx / group_tiles * heads, heads, idx % group_tiles};
  }
};

// As few groups as hold `most` KV heads each at most, and none larger than another by more than
// one.
constexpr HeadGroups make_head_groups(std::int64_t heads_kv, std::int64_t most, int heads_per_kv) {
  const std::int64_t groups = heads_kv > 0 ? (heads_kv + most - 1) / most : 1;
  const int smaller = static_cast<int>(heads_kv / groups) * heads_per_kv;
  const int larger = static_cast<int>(heads_kv % groups);  // as many groups have one KV head more
  if (larger == 0) return {smaller > 0 ? smaller : 1, smaller, 0};
  return {smaller + heads_per_kv, smaller, static_cast<int>(groups - larger) * smaller};
}

// Tiles of one group of heads come together, so that the group's K and V stay in L2. Without a mask
// the blocks of one head follow one another; with one, a group's longest tiles (its last query
// blocks) come first, and the short ones fill the gaps at the end.
struct TileOrder {
  int num_m_blocks;
  int heads;
  int batch;
  HeadGroups groups;  // of (batch, head) pairs
  bool longest_first;

  HOPPER_ATTENTION_HD constexpr int num_tiles() const { return num_m_blocks * heads * batch; }

  HOPPER_ATTENTION_HD constexpr WorkTile operator()(int work_idx) const {
    if (!longest_first) {
      const int pair = work_idx / num_m_blocks;
      return {work_idx % num_m_blocks, pair % heads, pair / heads};
    }
    const HeadGroups::Place place = groups(work_idx, num_m_blocks);
    const int pair = place.first_head + place.within % place.heads;
    return {num_m_blocks - 1 - place.within / place.heads, pair % heads, pair / heads};
  }
};

// What block `block` of the grid takes of the work_idx-th group of `cluster` neighbouring tiles,
// where the order counts such groups: its blocks follow one another. The last tile of a head may be
// past its end.
HOPPER_ATTENTION_HD constexpr WorkTile cluster_tile(const TileOrder& order, int work_idx,
                                                    int cluster, int block) {
  WorkTile tile = order(work_idx);
  tile.m_block = tile.m_block * cluster + block % cluster;
  return tile;
}

// Of an H100's or H200's 50 MB of L2; Q and O stream through the rest.
inline constexpr std::int64_t kL2GroupBytes = 32 << 20;

// Groups are as large as L2 allows and about equal: a small last group would leave blocks idle (5%
// of a causal run with 10, 10, .. 10 and 4 heads).
// min_group: KV heads that a group has even where L2 does not hold them.
constexpr TileOrder make_tile_order(int seqlen_q, int heads, int batch, int tile_m,
                                    bool longest_first, std::int64_t kv_bytes_per_head,
                                    int heads_per_kv, std::int64_t min_group = 1) {
  const int num_m_blocks = (seqlen_q + tile_m - 1) / tile_m;
  const std::int64_t kv_pairs = static_cast<std::int64_t>(heads) * batch / heads_per_kv;
  const std::int64_t fitting = kL2GroupBytes / (kv_bytes_per_head > 0 ? kv_bytes_per_head : 1);
  const std::int64_t most = fitting > min_group ? fitting : min_group;
  return {num_m_blocks, heads, batch, make_head_groups(kv_pairs, most, heads_per_kv),
          longest_first};
}

}  // namespace hopper_attention
