// backward_packed.h and ragged.h by brute force: where a packed batch's query blocks lie, which of
// them its key blocks visit, and what TMA's addresses come to.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "hopper_attention/backward_packed.h"
#include "hopper_attention/ragged.h"
#include "packed_batch.h"

namespace {

using namespace hopper_attention;

constexpr int kTiles[] = {64, 80, 96, 128};

int count_up(int length, int tile) {
  int blocks = 0;
  for (int at = 0; at < length; at += tile) ++blocks;
  return blocks;
}

// A sequence's own blocks are nobody else's, and all are in the workspace.
void every_row_has_a_query_block_of_its_sequence() {
  for (int round = 0; round < 1000; ++round) {
    const Batch batch = draw_batch(draw(0, 1) ? 700 : 3);
    const PackedLengths lengths = batch.lengths(true);
    for (int tile_m : kTiles) {
      check::context =
          std::to_string(batch.size()) + " sequences, blocks of " + std::to_string(tile_m);
      const std::int64_t blocks = max_blocks(lengths.total_q, batch.size(), tile_m);
      int free = 0;  // the first block behind those of the sequences before
      for (int i = 0; i <= batch.size(); ++i) {
        const Sequence sequence = sequence_at(lengths, i);
        const int first = first_query_block(sequence.q_begin, i, tile_m);
        CHECK(first >= free);
        free = first + count_up(sequence.rows, tile_m);
        CHECK(free <= blocks);
      }
    }
  }
}

void every_key_block_has_room_in_the_list() {
  static_assert(sizeof(KeyListHeader) % alignof(KeyEntry) == 0, "entries lie behind the header");
  static_assert(sizeof(KeyEntry) == 32, "two loads of 16 bytes");
  for (int round = 0; round < 1000; ++round) {
    const Batch batch = draw_batch(draw(0, 1) ? 700 : 3);
    const PackedLengths lengths = batch.lengths(false);
    for (int tile_n : kTiles) {
      check::context =
          std::to_string(batch.size()) + " sequences, blocks of " + std::to_string(tile_n);
      int blocks = 0;
      for (int i = 0; i <= batch.size(); ++i) {
        blocks += count_up(sequence_at(lengths, i).keys, tile_n);
      }
      const std::int64_t room = max_blocks(lengths.total_k, batch.size(), tile_n);
      CHECK(blocks <= room);
      CHECK(key_list_bytes(room) >= sizeof(KeyListHeader) + blocks * sizeof(KeyEntry));
    }
  }
}

// Those of rows that ask and see a key of the block.
bool visited(int seqlen_q, int seqlen_k, int left, int right, int m_block, int tile_m, int n_block,
             int tile_n) {
  for (int row = m_block * tile_m; row < std::min((m_block + 1) * tile_m, seqlen_q); ++row) {
    for (int key = n_block * tile_n; key < std::min((n_block + 1) * tile_n, seqlen_k); ++key) {
      if (sees(seqlen_q, seqlen_k, left, right, row, key)) return true;
    }
  }
  return false;
}

void key_blocks_visit_the_query_blocks_that_see_them() {
  constexpr int kTileM = 3, kTileN = 4;
  for (int seqlen_q = 0; seqlen_q <= 10; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= 9; ++seqlen_k) {
      for (const auto& [left, right] : {std::pair{-1, -1}, {-1, 0}, {2, 0}, {0, 3}, {4, 4}}) {
        const Mask mask = sequence_mask(make_mask(10, 9, false, left, right), seqlen_q, seqlen_k);
        for (int n_block = 0; n_block < 4; ++n_block) {  // beyond the keys that are used, too
          check::context = "key block " + std::to_string(n_block) + " of " +
                           std::to_string(seqlen_k) + " keys, " + std::to_string(seqlen_q) +
                           " rows, window " + std::to_string(left) + ", " + std::to_string(right);
          const BlockRange found = tile_query_blocks(mask, n_block, kTileM, kTileN);
          for (int m_block = 0; m_block < 5; ++m_block) {
            CHECK((m_block >= found.begin && m_block < found.end) ==
                  visited(seqlen_q, seqlen_k, left, right, m_block, kTileM, n_block, kTileN));
          }
        }
      }
    }
  }
}

// Of the list's groups: as many KV heads and blocks as were asked for, where there are as many, and
// no more bytes than L2 holds unless that is why.
void groups_of_key_blocks_are_large_enough_and_fit_in_l2() {
  constexpr std::int64_t kMinBlocks = 256;
  for (int total_q : {0, 1, 1000, 16384, 29534, 1 << 17, 1 << 20, kMaxLength}) {
    for (std::int64_t blocks : {std::int64_t{0}, std::int64_t{1}, std::int64_t{70},
                                std::int64_t{total_q} / 128 + 33, std::int64_t{total_q} / 64 + 1}) {
      for (int heads_kv : {1, 3, 8, 48}) {
        for (std::int64_t query_bytes : {512, 1024, 4096, 16384}) {
          for (int min_heads : {1, 4}) {
            check::context = std::to_string(total_q) + " rows, " + std::to_string(blocks) +
                             " key blocks, " + std::to_string(heads_kv) + " KV heads, " +
                             std::to_string(query_bytes) + " bytes";
            const PackedOrder order =
                make_key_order(total_q, blocks, heads_kv, query_bytes, kMinBlocks, min_heads);
            CHECK(order.heads == heads_kv && order.group_keys >= 1);
            CHECK(order.num_groups >= 1 && order.num_groups <= kMaxSequenceGroups);
            CHECK(static_cast<std::int64_t>(order.group_keys) * order.num_groups >= total_q);
            CHECK(order.head_groups.size >= 1 && order.head_groups.size <= heads_kv);
            const bool all_heads = order.head_groups.size == heads_kv;
            CHECK(all_heads || order.head_groups.size >= min_heads);
            const bool all = all_heads && order.num_groups == 1;
            CHECK(all || blocks * order.head_groups.size / order.num_groups >= kMinBlocks);
            const PackedOrder fitting = make_packed_order(total_q, heads_kv, 1, query_bytes);
            CHECK(order.num_groups <= fitting.num_groups);
            CHECK(order.head_groups.size >= fitting.head_groups.size);
            CHECK(order.group_of(0) == 0 && order.group_of(total_q) < order.num_groups);
          }
        }
      }
    }
  }
}

// TMA adds up coordinates times strides modulo 2^64, of elements inside every dimension.
struct Ragged {
  std::uint64_t row_stride;  // bytes

  static bool inside(RowOrigin origin, std::int64_t row) {
    const std::int64_t at = origin.row + row;
    return at >= 0 && at < kRaggedRows && origin.shift >= 0 && origin.shift < kMaxShift &&
           kRaggedRows < kMaxShift;
  }
  std::uint64_t offset(RowOrigin origin, std::int64_t row) const {
    return static_cast<std::uint64_t>(origin.row + row) * row_stride +
           static_cast<std::uint64_t>(origin.shift) * row_stride +
           std::uint64_t{kRaggedRows} * wrap_stride(row_stride);
  }
};

void ragged_rows_are_a_sequences_own_and_no_others() {
  constexpr std::uint64_t kLargest = (std::uint64_t{1} << 40) - 16;  // TMA's limit of a stride
  const std::vector<std::uint64_t> strides = {16,
                                              256,
                                              8192 + 16,
                                              (std::uint64_t{1} << 34) - 16,
                                              std::uint64_t{1} << 34,
                                              (std::uint64_t{1} << 34) + 16,
                                              (std::uint64_t{1} << 39) + 4096,
                                              kLargest};
  for (std::uint64_t stride : strides) {
    check::context = "row stride " + std::to_string(stride);
    const std::uint64_t wrap = wrap_stride(stride);
    CHECK(wrap > 0 && wrap <= std::uint64_t{1} << 34 && wrap % 16 == 0);
    for (int round = 0; round < 300; ++round) {
      const int length = draw(0, 2) == 0 ? draw(0, 3) : draw(0, kMaxLength);
      const int begin = draw(0, 2) == 0 ? draw(0, 3) : draw(0, kMaxLength - length);
      const RowOrigin origin = ragged_origin(begin, length);
      check::context = "row stride " + std::to_string(stride) + ", rows " + std::to_string(begin) +
                       " to " + std::to_string(begin + length);
      const Ragged tensor{stride};
      for (int row : {0, 1, length / 2, length - 2, length - 1}) {
        if (row < 0 || row >= length) continue;
        CHECK(Ragged::inside(origin, row));
        CHECK(tensor.offset(origin, row) == static_cast<std::uint64_t>(begin + row) * stride);
      }
      // A box of 128 rows may begin at the last one: what is behind it is outside.
      for (int behind : {0, 1, 127}) CHECK(!Ragged::inside(origin, std::int64_t{length} + behind));
      CHECK(origin.row >= 0);  // of signed 32-bit coordinates
    }
  }
}

}  // namespace

int main() {
  every_row_has_a_query_block_of_its_sequence();
  every_key_block_has_room_in_the_list();
  key_blocks_visit_the_query_blocks_that_see_them();
  groups_of_key_blocks_are_large_enough_and_fit_in_l2();
  ragged_rows_are_a_sequences_own_and_no_others();
  return check::result();
}
