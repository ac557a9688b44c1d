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

// Tiles of one group of heads come together, so that the group's K and V stay in L2. Without a mask
// the blocks of one head follow one another; with one, a group's longest tiles (its last query
// blocks) come first, and the short ones fill the gaps at the end. Where the groups do not divide
// the heads, the smaller one comes first: as the last one it may have too few tiles to fill the
// gaps that its own longest ones leave (5% of a causal run with 10, 10, .. 10 and 4 heads).
struct TileOrder {
  int num_m_blocks;
  int heads;
  int batch;
  int group;        // (batch, head) pairs a group, 1 or more
  int first_group;  // pairs of the smaller one, 0 where groups divide them all
  bool longest_first;

  HOPPER_ATTENTION_HD constexpr int num_tiles() const { return num_m_blocks * heads * batch; }

  HOPPER_ATTENTION_HD constexpr WorkTile operator()(int work_idx) const {
    if (!longest_first) {
      const int pair = work_idx / num_m_blocks;
      return {work_idx % num_m_blocks, pair % heads, pair / heads};
    }
    const int first_tiles = first_group * num_m_blocks;
    const bool in_first = work_idx < first_tiles;
    const int pairs = in_first ? first_group : group;
    const int idx = in_first ? work_idx : work_idx - first_tiles;
    const int group_tiles = group * num_m_blocks;
    const int first_pair = (in_first ? 0 : first_group) + idx / group_tiles * group;
    const int within = idx % group_tiles;
    const int pair = first_pair + within % pairs;
    return {num_m_blocks - 1 - within / pairs, pair % heads, pair / heads};
  }
};

// Of an H100's or H200's 50 MB of L2; Q and O stream through the rest.
inline constexpr std::int64_t kL2GroupBytes = 32 << 20;

// Groups are as large as L2 allows and about equal: a small last group would leave blocks idle.
// min_group: KV heads that a group has even where L2 does not hold them.
constexpr TileOrder make_tile_order(int seqlen_q, int heads, int batch, int tile_m,
                                    bool longest_first, std::int64_t kv_bytes_per_head,
                                    int heads_per_kv, std::int64_t min_group = 1) {
  const int num_m_blocks = (seqlen_q + tile_m - 1) / tile_m;
  const std::int64_t pairs = static_cast<std::int64_t>(heads) * batch;
  const std::int64_t kv_pairs = pairs / heads_per_kv;
  const std::int64_t bytes = kv_bytes_per_head > 0 ? kv_bytes_per_head : 1;
  const std::int64_t fitting = kL2GroupBytes / bytes;
  const std::int64_t wanted = fitting > min_group ? fitting : min_group;
  const std::int64_t groups = (kv_pairs + wanted - 1) / wanted;
  const std::int64_t group = groups > 0 ? (kv_pairs + groups - 1) / groups * heads_per_kv : 1;
  const std::int64_t size = group > 0 ? group : 1;
  const int first_group = static_cast<int>(pairs % size);
  return {num_m_blocks, heads, batch, static_cast<int>(size), first_group, longest_first};
}

}  // namespace hopper_attention
