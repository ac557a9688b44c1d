// Packed batches: sequences of any lengths, one after the other, with their lengths on the device.
// A small kernel lists their tiles for the forward kernel, whose blocks take them from that list,
// but for those that they begin with, while the list is made.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hopper_attention/block_range.h"
#include "hopper_attention/fast_divide.h"
#include "hopper_attention/tile_order.h"

namespace hopper_attention {

// Sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of Q and O, and cu_seqlens_k[i] to
// cu_seqlens_k[i + 1] of K and V.
struct PackedLengths {
  const std::int32_t* cu_seqlens_q;  // (batch + 1), not decreasing, the first 0
  const std::int32_t* cu_seqlens_k;  // (batch + 1), likewise
  const std::int32_t* seqused_q;     // (batch), may be null: how many of its rows a sequence uses
  const std::int32_t* seqused_k;     // (batch), may be null
  int batch;
  int total_q;
  int total_k;
};

struct Sequence {
  int q_begin;   // its first row of Q and O
  int rows;      // how many of them are its own
  int seqlen_q;  // of these, those that ask; O of the others is zero
  int k_begin;
  int seqlen_k;
  int keys;  // rows of K and V that are its own, of which it uses seqlen_k
};

HOPPER_ATTENTION_HD constexpr int clamp_length(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

// Sequence `index`; number `batch` are the rows behind the last one, which are nobody's. Whatever
// the lengths say, no sequence reaches beyond the tensors.
HOPPER_ATTENTION_HD constexpr Sequence sequence_at(const PackedLengths& lengths, int index) {
  const int q_begin = clamp_length(lengths.cu_seqlens_q[index], 0, lengths.total_q);
  const int k_begin = clamp_length(lengths.cu_seqlens_k[index], 0, lengths.total_k);
  const int next = index < lengths.batch ? index + 1 : index;  // so that all four come at once
  const int q_next = lengths.cu_seqlens_q[next], k_next = lengths.cu_seqlens_k[next];
  if (index == lengths.batch) {
    return {q_begin, lengths.total_q - q_begin, 0, k_begin, 0, lengths.total_k - k_begin};
  }
  const int q_end = clamp_length(q_next, q_begin, lengths.total_q);
  const int k_end = clamp_length(k_next, k_begin, lengths.total_k);
  const int rows = q_end - q_begin, keys = k_end - k_begin;
  const int used_q = lengths.seqused_q != nullptr ? lengths.seqused_q[index] : rows;
  const int used_k = lengths.seqused_k != nullptr ? lengths.seqused_k[index] : keys;
  return {q_begin, rows, clamp_length(used_q, 0, rows), k_begin, clamp_length(used_k, 0, keys),
          keys};
}

// What the forward kernel's roles know of a tile's sequence.
struct alignas(16) TileSequence {
  int q_begin;
  int rows;
  int seqlen_q;
  int seqlen_k;
};

// A tile of every head.
struct alignas(16) TileEntry {
  int m_block;
  int batch;
  int k_begin;
  int unused;
  TileSequence sequence;
};

// The mask of one sequence, from one that was made for the totals: there a side without a limit
// reaches total_q or total_k, and no sequence is longer.
HOPPER_ATTENTION_HD constexpr Mask sequence_mask(const Mask& mask, int seqlen_q, int seqlen_k) {
  const int left = mask.window_left < seqlen_k ? mask.window_left : seqlen_k;
  const int right = mask.window_right < seqlen_q ? mask.window_right : seqlen_q;
  return {seqlen_q, seqlen_k, left, right};
}

// Key blocks that a tile's rows see; none where it has no row that asks.
HOPPER_ATTENTION_HD constexpr BlockRange tile_key_blocks(const Mask& mask, int m_block, int tile_m,
                                                         int tile_n) {
  const int row_begin = m_block * tile_m;
  if (row_begin >= mask.seqlen_q) return {0, 0};
  const int rows_left = mask.seqlen_q - row_begin;
  return key_blocks(mask, row_begin, row_begin + (rows_left < tile_m ? rows_left : tile_m), tile_n);
}

// Tiles are listed longest first, by their key blocks: exactly up to 16, then to an eighth of a
// power of two.
inline constexpr int kCostBuckets = 192;

HOPPER_ATTENTION_HD constexpr int cost_bucket(int num_key_blocks) {
  int octave = 0;
  while (num_key_blocks >> octave >= 16) ++octave;
  return 8 * octave + (num_key_blocks >> octave);  // the last part is 8 to 15 from 16 on
}
static_assert(cost_bucket(kMaxLength / 16) < kCostBuckets, "tiles have 16 keys or more");

// Groups of tiles whose K and V stay in L2 together, one group after the other. Sequences are
// grouped by where their keys begin, a group_keys long each; within a group of sequences come
// groups of heads, within these the tiles, longest first, and a tile's heads last.
inline constexpr int kMaxSequenceGroups = 32;

struct PackedOrder {
  int heads;
  HeadGroups head_groups;  // of whole KV heads
  int group_keys;
  int num_groups;  // of sequences, 1 to kMaxSequenceGroups

  struct Work {
    int entry;  // counted from the group's first
    int head;
  };

  HOPPER_ATTENTION_HD constexpr int group_of(int k_begin) const {
    const int group = k_begin / group_keys;
    return group < num_groups ? group : num_groups - 1;
  }

  // The work_idx-th of a sequence group's entries x heads.
  HOPPER_ATTENTION_HD constexpr Work operator()(int work_idx, int entries) const {
    const HeadGroups::Place place = head_groups(work_idx, entries);
    return {place.within / place.heads, place.first_head + place.within % place.heads};
  }
};

// Divisors that the forward kernel's blocks need for each tile.
struct PackedDivides {
  FastDivide by_smaller;  // heads of a group, as HeadGroups has them
  FastDivide by_size;
  FastDivide by_heads_per_kv;
};

constexpr PackedDivides make_packed_divides(const PackedOrder& order, int heads_per_kv) {
  const HeadGroups& groups = order.head_groups;
  return {FastDivide(groups.in_smaller > 0 ? groups.smaller : groups.size), FastDivide(groups.size),
          FastDivide(heads_per_kv)};
}

// A block's way through the order, which only goes forward: the groups of sequences and of heads
// that it is in. Takes no division but by heads.
struct PackedWalk {
  int group = 0;       // of sequences; order.num_groups once there are no tiles left
  int first_head = 0;  // of the group of heads
  int begin = 0;       // work_idx of both groups' first tile

  // The work_idx-th tile of the order, its entry counted from the list's first; work_idx must not
  // decrease from call to call. entries_begin, entries_end: of sequence group `group`, which must
  // not be past the end; group_end(g): one past group g's last entry.
  template <class GroupEnd>
  HOPPER_ATTENTION_HD constexpr PackedOrder::Work operator()(const PackedOrder& order,
                                                             const PackedDivides& divides,
                                                             int work_idx, int entries_begin,
                                                             int entries_end,
                                                             const GroupEnd& group_end) {
    for (;;) {
      const bool smaller = first_head < order.head_groups.in_smaller;
      const int heads = smaller ? order.head_groups.smaller : order.head_groups.size;
      const int tiles = heads * (entries_end - entries_begin);
      if (work_idx - begin < tiles) {
        const FastDivide& by_heads = smaller ? divides.by_smaller : divides.by_size;
        const int within = work_idx - begin;
        const int entry = by_heads.quotient(within);
        return {entries_begin + entry, first_head + within - entry * heads};
      }
      begin += tiles;
      first_head += heads;
      if (first_head < order.heads) continue;
      first_head = 0;
      if (++group >= order.num_groups) return {};
      entries_begin = entries_end;
      entries_end = group_end(group);
    }
  }
};

// Groups are as large as L2 allows and about equal.
constexpr PackedOrder make_packed_order(int total_k, int heads, int heads_per_kv,
                                        std::int64_t bytes_per_key) {
  const std::int64_t fitting_keys = kL2GroupBytes / bytes_per_key;  // of one KV head
  const std::int64_t keys = total_k > 0 ? total_k : 1;
  if (keys > fitting_keys) {
    std::int64_t groups = (keys + fitting_keys - 1) / fitting_keys;
    if (groups > kMaxSequenceGroups) groups = kMaxSequenceGroups;
    return {heads,
            {heads_per_kv, heads_per_kv, 0},
            static_cast<int>((keys + groups - 1) / groups),
            static_cast<int>(groups)};
  }
  return {heads, make_head_groups(heads / heads_per_kv, fitting_keys / keys, heads_per_kv),
          static_cast<int>(keys), 1};
}

// The tiles that blocks of the grid begin with: the list's first `entries`, each for the first
// `heads`. Block b takes the head b % heads of entry b / heads; blocks from tiles() on take none.
struct PackedStart {
  int entries;
  int heads;  // 1 or more

  HOPPER_ATTENTION_HD constexpr int tiles() const { return entries * heads; }

  // Whether the tile that has `behind` tiles of its sequence behind it is one of the entries.
  HOPPER_ATTENTION_HD constexpr bool holds(int sequence, int behind, int group, int batch) const {
    return group == 0 && sequence < batch &&
           sequence + static_cast<std::int64_t>(behind) * batch < entries;
  }
};
inline constexpr int kMaxStartEntries = 128;

constexpr PackedStart make_packed_start(const PackedOrder& order, int grid, int batch) {
  const HeadGroups& groups = order.head_groups;
  const int heads = groups.in_smaller > 0 ? groups.smaller : groups.size;  // the first group's
  const int whole = grid / heads < kMaxStartEntries ? grid / heads : kMaxStartEntries;
  return {batch > 0 ? whole : 0, heads};
}

// Entry `idx` of a list's first ones, found by itself: the last tile of sequence idx, the longest
// under a causal mask; where the sequences are fewer, the tiles before these follow. An entry has
// no rows where there is no such tile, or where it belongs to a later group of sequences.
HOPPER_ATTENTION_HD constexpr TileEntry start_entry(const PackedLengths& lengths,
                                                    const PackedOrder& order, int tile_m, int idx) {
  const int index = idx % lengths.batch;
  const Sequence sequence = sequence_at(lengths, index);
  const int m_block = (sequence.rows + tile_m - 1) / tile_m - 1 - idx / lengths.batch;
  if (m_block < 0 || order.group_of(sequence.k_begin) != 0) return {};
  return {m_block,
          index,
          sequence.k_begin,
          0,
          {sequence.q_begin, sequence.rows, sequence.seqlen_q, sequence.seqlen_k}};
}

// The workspace: this, and the entries behind it. Nothing of it need be set before a call.
struct alignas(16) PackedHeader {
  std::uint32_t next_tile;            // drawn so far, beyond those that the grid begins with
  int group_end[kMaxSequenceGroups];  // one past a group's last entry; the next group's first
};

// A sequence's last tile may have a single row; so may that of the rows behind the last sequence.
constexpr std::int64_t max_entries(int total_q, int batch, int tile_m) {
  return static_cast<std::int64_t>(total_q) / tile_m + batch + 1;
}
inline constexpr int kSmallestTileM = 128;
constexpr std::size_t packed_workspace_bytes(int total_q, int batch) {
  const std::int64_t entries = max_entries(total_q, batch, kSmallestTileM) + kMaxStartEntries;
  return sizeof(PackedHeader) + static_cast<std::size_t>(entries) * sizeof(TileEntry);
}

}  // namespace hopper_attention
