// packed.h by brute force: what a packed batch's lengths mean, its tiles, and their order.
#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "hopper_attention/config.h"
#include "hopper_attention/packed.h"
#include "packed_batch.h"

namespace {

using namespace hopper_attention;

void sequences_are_where_the_lengths_say() {
  for (int round = 0; round < 300; ++round) {
    const Batch batch = draw_batch(400);
    for (bool with_used : {false, true}) {
      const PackedLengths lengths = batch.lengths(with_used);
      for (int i = 0; i < batch.size(); ++i) {
        check::context = "sequence " + std::to_string(i) + " of " + std::to_string(batch.size());
        const Sequence found = sequence_at(lengths, i);
        const int rows = batch.cu_q[i + 1] - batch.cu_q[i];
        const int keys = batch.cu_k[i + 1] - batch.cu_k[i];
        CHECK(found.q_begin == batch.cu_q[i] && found.rows == rows);
        CHECK(found.k_begin == batch.cu_k[i] && found.keys == keys);
        CHECK(found.seqlen_q == (with_used ? batch.used_q[i] : rows));
        CHECK(found.seqlen_k == (with_used ? batch.used_k[i] : keys));
      }
      check::context = "the rows behind the last sequence";
      const Sequence nobodys = sequence_at(lengths, batch.size());
      CHECK(nobodys.q_begin == batch.cu_q.back() && nobodys.rows == batch.behind_q);
      CHECK(nobodys.k_begin == batch.cu_k.back() && nobodys.keys == batch.behind_k);
      CHECK(nobodys.seqlen_q == 0 && nobodys.seqlen_k == 0);
    }
  }
}

void nonsense_never_reaches_beyond_the_tensors() {
  for (int round = 0; round < 2000; ++round) {
    const int batch = draw(0, 6), total_q = draw(0, 500), total_k = draw(0, 500);
    std::vector<int> cu_q(batch + 1), cu_k(batch + 1), used_q(batch), used_k(batch);
    for (auto* values : {&cu_q, &cu_k, &used_q, &used_k}) {
      for (int& value : *values) value = draw_nonsense(500);
    }
    const PackedLengths lengths{cu_q.data(), cu_k.data(), used_q.data(), used_k.data(),
                                batch,       total_q,     total_k};
    for (int i = 0; i <= batch; ++i) {
      check::context = "nonsense, sequence " + std::to_string(i);
      const Sequence found = sequence_at(lengths, i);
      CHECK(found.q_begin >= 0 && found.rows >= 0 && found.q_begin + found.rows <= total_q);
      CHECK(found.seqlen_q >= 0 && found.seqlen_q <= found.rows);
      CHECK(found.k_begin >= 0 && found.keys >= 0 && found.k_begin + found.keys <= total_k);
      CHECK(found.seqlen_k >= 0 && found.seqlen_k <= found.keys);
    }
  }
}

void masks_made_for_the_totals_fit_each_sequence() {
  constexpr int kTotalQ = 9, kTotalK = 11;
  for (int left = -1; left <= kTotalK; ++left) {
    for (int right = -1; right <= kTotalQ; ++right) {
      const Mask all = make_mask(kTotalQ, kTotalK, false, left, right);
      for (int seqlen_q = 0; seqlen_q <= kTotalQ; ++seqlen_q) {
        for (int seqlen_k = 0; seqlen_k <= kTotalK; ++seqlen_k) {
          check::context = "window (" + std::to_string(left) + ", " + std::to_string(right) +
                           ") of " + std::to_string(seqlen_q) + ", " + std::to_string(seqlen_k);
          const Mask mask = sequence_mask(all, seqlen_q, seqlen_k);
          for (int row = 0; row < seqlen_q; ++row) {
            for (int key = 0; key < seqlen_k; ++key) {
              const bool seen = key >= mask.first_key(row) && key < mask.end_key(row);
              CHECK(seen == sees(seqlen_q, seqlen_k, left, right, row, key));
            }
          }
        }
      }
    }
  }
}

void tiles_visit_the_blocks_that_their_asking_rows_see() {
  constexpr int kTileM = 4, kTileN = 3;
  for (int seqlen_q = 0; seqlen_q <= 9; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= 10; ++seqlen_k) {
      for (const auto& [left, right] : {std::pair{-1, -1}, {-1, 0}, {2, 0}, {0, 3}, {4, 4}}) {
        const Mask mask = sequence_mask(make_mask(9, 10, false, left, right), seqlen_q, seqlen_k);
        for (int m_block = 0; m_block < 4; ++m_block) {
          check::context = "tile " + std::to_string(m_block) + " of " + std::to_string(seqlen_q) +
                           " rows, " + std::to_string(seqlen_k) + " keys";
          const BlockRange found = tile_key_blocks(mask, m_block, kTileM, kTileN);
          for (int block = 0; block * kTileN < seqlen_k; ++block) {
            bool any = false;
            for (int row = m_block * kTileM; row < std::min((m_block + 1) * kTileM, seqlen_q);
                 ++row) {
              for (int key = block * kTileN; key < std::min((block + 1) * kTileN, seqlen_k);
                   ++key) {
                any = any || sees(seqlen_q, seqlen_k, left, right, row, key);
              }
            }
            CHECK((block >= found.begin && block < found.end) == any);
          }
          CHECK(found.empty() || found.end * kTileN < seqlen_k + kTileN);
        }
      }
    }
  }
}

void costs_are_ordered_and_precise_to_an_eighth() {
  int before = cost_bucket(0);
  check::context = "no key block";
  CHECK(before == 0);
  for (int blocks = 1; blocks <= kMaxLength / 16; blocks += blocks < 4096 ? 1 : blocks / 1000) {
    check::context = std::to_string(blocks) + " key blocks";
    const int bucket = cost_bucket(blocks);
    CHECK(bucket >= before && bucket < kCostBuckets);
    if (blocks <= 16) CHECK(bucket == blocks);
    // Whoever costs an eighth more, and one block, comes first.
    CHECK(cost_bucket(blocks + blocks / 8 + 1) > bucket);
    before = bucket;
  }
}

void each_entry_comes_once_for_each_head() {
  for (int heads_per_kv : {1, 2, 3}) {
    for (int heads_kv = 1; heads_kv <= 4; ++heads_kv) {
      const int heads = heads_kv * heads_per_kv;
      for (int group_kv = 1; group_kv <= heads_kv; ++group_kv) {
        for (int entries = 1; entries <= 5; ++entries) {
          check::context = std::to_string(entries) + " entries, " + std::to_string(heads) +
                           " heads, groups of " + std::to_string(group_kv * heads_per_kv);
          const HeadGroups groups = make_head_groups(heads_kv, group_kv, heads_per_kv);
          const PackedOrder order{heads, groups, 100, 1};
          const int before = groups.in_smaller > 0 ? groups.in_smaller / groups.smaller : 0;
          std::set<std::pair<int, int>> seen;
          int group = 0, entry = 0;
          for (int work_idx = 0; work_idx < entries * heads; ++work_idx) {
            const PackedOrder::Work work = order(work_idx, entries);
            CHECK(work.entry >= 0 && work.entry < entries && work.head >= 0 && work.head < heads);
            CHECK(seen.insert({work.entry, work.head}).second);
            // Groups of heads one after the other, and within them the entries in their order.
            const bool first = work.head < groups.in_smaller;
            const int now = first ? work.head / groups.smaller
                                  : (work.head - groups.in_smaller) / groups.size + before;
            CHECK(now == group || (now == group + 1 && work.entry == 0));
            CHECK(now != group || work.entry == entry || work.entry == entry + 1);
            group = now, entry = work.entry;
          }
          CHECK(static_cast<int>(seen.size()) == entries * heads);
        }
      }
    }
  }
}

// Every block's way through the order ends where the order's own divisions do, whatever of it the
// other blocks draw meanwhile.
void a_walk_finds_what_the_order_has() {
  for (int round = 0; round < 3000; ++round) {
    const int heads_per_kv = draw(1, 4), heads_kv = draw(1, 6), heads = heads_kv * heads_per_kv;
    const int num_groups = draw(1, draw(0, 1) ? 1 : 6);
    const HeadGroups groups = make_head_groups(heads_kv, draw(1, heads_kv), heads_per_kv);
    const PackedOrder order{heads, groups, 100, num_groups};
    const PackedDivides divides = make_packed_divides(order, heads_per_kv);
    std::vector<int> ends;
    for (int end = 0; static_cast<int>(ends.size()) < num_groups;) {
      ends.push_back(end += draw(0, 2) ? draw(0, 9) : 0);
    }
    const auto group_end = [&](int group) { return ends[group]; };
    check::context = std::to_string(num_groups) + " groups, " + std::to_string(ends.back()) +
                     " entries, " + std::to_string(heads) + " heads";
    PackedWalk walk;
    int group = 0;
    for (int work_idx = draw(0, 3); walk.group < num_groups; work_idx += draw(0, 40)) {
      const int begin = walk.group > 0 ? ends[walk.group - 1] : 0;
      const PackedOrder::Work found =
          walk(order, divides, work_idx, begin, ends[walk.group], group_end);
      while (group < num_groups && work_idx >= ends[group] * heads) ++group;
      CHECK(walk.group == group);
      if (group == num_groups) break;
      const int before = group > 0 ? ends[group - 1] : 0;
      const PackedOrder::Work work = order(work_idx - before * heads, ends[group] - before);
      CHECK(found.entry == before + work.entry && found.head == work.head);
      CHECK(divides.by_heads_per_kv.quotient(found.head) == found.head / heads_per_kv);
    }
  }
}

void groups_fit_in_l2() {
  for (int total_k : {0, 1, 1000, 16384, 29534, 1 << 17, 1 << 20, kMaxLength}) {
    for (int heads_per_kv : {1, 4}) {
      for (int heads_kv : {1, 8, 48}) {
        for (std::int64_t bytes_per_key : {256, 512, 1024}) {
          const int heads = heads_kv * heads_per_kv;
          check::context = std::to_string(total_k) + " keys, " + std::to_string(heads) + " heads";
          const PackedOrder order = make_packed_order(total_k, heads, heads_per_kv, bytes_per_key);
          CHECK(order.heads == heads && order.group_keys >= 1);
          CHECK(order.num_groups >= 1 && order.num_groups <= kMaxSequenceGroups);
          const int group = order.head_groups.size;
          CHECK(group >= 1 && group % heads_per_kv == 0);
          CHECK(static_cast<std::int64_t>(order.group_keys) * order.num_groups >= total_k);
          const std::int64_t bytes = order.group_keys * bytes_per_key;
          const bool too_many = order.num_groups == kMaxSequenceGroups;
          CHECK(too_many || bytes * (group / heads_per_kv) <= kL2GroupBytes);
          int before = 0;
          for (int begin = 0; begin <= total_k && begin >= 0; begin += total_k / 97 + 1) {
            const int group = order.group_of(begin);
            CHECK(group >= before && group < order.num_groups);
            before = group;
          }
        }
      }
    }
  }
  check::context = "no heads";
  CHECK(make_packed_order(100, 0, 1, 512).head_groups.size >= 1);  // dividing by it is safe
}

// The list's first entries, found one by one, and the tiles that it is told to leave out.
void blocks_begin_with_tiles_of_the_first_group() {
  constexpr int kTileM = 128;
  for (int round = 0; round < 1000; ++round) {
    const Batch batch = draw_batch(draw(0, 1) ? 700 : 200);
    const PackedLengths lengths = batch.lengths(draw(0, 1));
    const int heads_per_kv = draw(1, 4), heads = draw(1, 6) * heads_per_kv, grid = draw(1, 132);
    const std::int64_t bytes_per_key = draw(0, 1) ? 512 : kL2GroupBytes / draw(1, 2000);
    const PackedOrder order =
        make_packed_order(lengths.total_k, heads, heads_per_kv, bytes_per_key);
    const PackedStart start = make_packed_start(order, grid, batch.size());
    check::context = std::to_string(start.entries) + " entries of " + std::to_string(batch.size()) +
                     " sequences, " + std::to_string(order.num_groups) + " groups";
    CHECK(start.entries >= 0 && start.entries <= kMaxStartEntries && start.tiles() <= grid);
    CHECK(batch.size() > 0 || start.entries == 0);
    std::set<std::pair<int, int>> begun;
    for (int idx = 0; idx < start.entries; ++idx) {
      const TileEntry entry = start_entry(lengths, order, kTileM, idx);
      const Sequence sequence = sequence_at(lengths, entry.batch);
      if (entry.sequence.rows == 0) {
        CHECK(entry.m_block == 0 && entry.sequence.seqlen_q == 0 && entry.sequence.seqlen_k == 0);
        continue;
      }
      CHECK(begun.insert({entry.batch, entry.m_block}).second);
      CHECK(entry.m_block >= 0 && entry.m_block * kTileM < sequence.rows);
      CHECK(entry.k_begin == sequence.k_begin && order.group_of(entry.k_begin) == 0);
      CHECK(entry.sequence.q_begin == sequence.q_begin && entry.sequence.rows == sequence.rows);
      CHECK(entry.sequence.seqlen_q == sequence.seqlen_q);
      CHECK(entry.sequence.seqlen_k == sequence.seqlen_k);
      // The first tile of a list is one of the group's first heads, as blocks have it.
      const PackedOrder::Work work = order(idx * start.heads, start.entries);
      CHECK(work.entry == idx && work.head == 0);
    }
    for (int i = 0; i <= batch.size(); ++i) {
      const Sequence sequence = sequence_at(lengths, i);
      const int tiles = (sequence.rows + kTileM - 1) / kTileM;
      for (int m_block = 0; m_block < tiles; ++m_block) {
        const int group = order.group_of(sequence.k_begin);
        const bool held = start.holds(i, tiles - 1 - m_block, group, batch.size());
        CHECK(held == (begun.count({i, m_block}) > 0));
      }
    }
  }
}

void every_tile_has_room_in_the_workspace() {
  for (int round = 0; round < 1000; ++round) {
    const Batch batch = draw_batch(draw(0, 1) ? 700 : 3);
    const PackedLengths lengths = batch.lengths(false);
    for (int tile_m : {128, 192}) {
      check::context =
          std::to_string(batch.size()) + " sequences, tiles of " + std::to_string(tile_m) + " rows";
      std::int64_t tiles = 0;
      for (int i = 0; i <= batch.size(); ++i) {
        tiles += (sequence_at(lengths, i).rows + tile_m - 1) / tile_m;
      }
      CHECK(tiles <= max_entries(lengths.total_q, batch.size(), tile_m));
      const std::size_t bytes = packed_workspace_bytes(lengths.total_q, batch.size());
      CHECK(bytes >= sizeof(PackedHeader) + (tiles + kMaxStartEntries) * sizeof(TileEntry));
    }
  }
  static_assert(sizeof(PackedHeader) % alignof(TileEntry) == 0, "entries lie behind the header");
}

}  // namespace

int main() {
  sequences_are_where_the_lengths_say();
  nonsense_never_reaches_beyond_the_tensors();
  masks_made_for_the_totals_fit_each_sequence();
  tiles_visit_the_blocks_that_their_asking_rows_see();
  costs_are_ordered_and_precise_to_an_eighth();
  each_entry_comes_once_for_each_head();
  a_walk_finds_what_the_order_has();
  groups_fit_in_l2();
  blocks_begin_with_tiles_of_the_first_group();
  every_tile_has_room_in_the_workspace();
  return check::result();
}
