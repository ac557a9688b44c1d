// Packed batches in the backward pass: where the query blocks of a sequence lie in the workspace,
// and the list of key blocks that is made on the device, as the lengths lie there.
#pragma once

#include "hopper_attention/packed.h"

namespace hopper_attention {

// Each sequence has query blocks of its own, as if it began with a whole one. The bounds of all of
// them are known without the lengths: sequence i begins with block q_begin / tile_m + i, and its
// blocks end where the next one's begin or earlier.
HOPPER_ATTENTION_HD constexpr int first_query_block(int q_begin, int index, int tile_m) {
  return q_begin / tile_m + index;
}

// At most, the rows behind the last sequence included; as many hold all key blocks.
constexpr std::int64_t max_blocks(int total, int batch, int tile) {
  return max_entries(total, batch, tile);
}

// Groups of key blocks whose queries, dO and dQ stay in L2 together, of whole KV heads and of
// sequences by where their queries begin. They are as large as L2 allows, about equal, and of
// min_blocks blocks and min_heads heads even where L2 does not hold them. query_bytes: of one query
// of one KV head's group. key_blocks: of one KV head.
constexpr PackedOrder make_key_order(int total_q, std::int64_t key_blocks, int heads_kv,
                                     std::int64_t query_bytes, std::int64_t min_blocks,
                                     int min_heads) {
  PackedOrder order = make_packed_order(total_q, heads_kv, 1, query_bytes);
  const std::int64_t blocks = key_blocks > 0 ? key_blocks : 1;
  const std::int64_t most_groups = blocks * heads_kv / min_blocks;
  if (order.num_groups > most_groups) {
    order.num_groups = most_groups > 1 ? static_cast<int>(most_groups) : 1;
    order.group_keys = (total_q + order.num_groups - 1) / order.num_groups;
    if (order.group_keys < 1) order.group_keys = 1;
  }
  const std::int64_t wanted = (min_blocks * order.num_groups + blocks - 1) / blocks;
  const std::int64_t least = wanted > min_heads ? wanted : min_heads;
  if (order.head_groups.size < least) {
    const int size = least < heads_kv ? static_cast<int>(least) : heads_kv;
    order.head_groups = {size, heads_kv % size, heads_kv % size};
  }
  return order;
}

// A key block of every KV head; or a cluster of them, which counts as one block of all its keys.
struct alignas(16) KeyEntry {
  int n_block;
  int first_block;  // first_query_block
  int q_begin;
  int seqlen_q;
  int k_begin;
  int seqlen_k;
  int keys;  // Sequence's
  int unused;
};

// Query blocks that see a key of one block; none where it has no key that is used.
HOPPER_ATTENTION_HD constexpr BlockRange tile_query_blocks(const Mask& mask, int n_block,
                                                           int tile_m, int tile_n) {
  const int begin = n_block * tile_n;
  if (begin >= mask.seqlen_k) return {0, 0};
  const int left = mask.seqlen_k - begin;
  return query_blocks(mask, begin, begin + (left < tile_n ? left : tile_n), tile_m);
}

// The list in the workspace: this, and the entries behind it.
struct alignas(16) KeyListHeader {
  int group_end[kMaxSequenceGroups];  // as PackedHeader's
};

// What a launch knows of the list.
struct KeyList {
  PackedLengths lengths;
  PackedOrder order;  // of KV heads, and of sequences by where their queries begin
  KeyListHeader* header;
  KeyEntry* entries;  // null: the batch is dense
  int max_entries;
};

constexpr std::uint64_t key_list_bytes(std::int64_t entries) {
  return sizeof(KeyListHeader) + static_cast<std::uint64_t>(entries) * sizeof(KeyEntry);
}

}  // namespace hopper_attention
