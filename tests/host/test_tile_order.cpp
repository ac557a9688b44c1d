// Every tile once, longest first within a group of heads whose K and V fit in L2.
#include <climits>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "hopper_attention/tile_order.h"

namespace {

using namespace hopper_attention;

std::vector<WorkTile> walk(const TileOrder& order) {
  std::vector<WorkTile> tiles;
  for (int work_idx = 0; work_idx < order.num_tiles(); ++work_idx) tiles.push_back(order(work_idx));
  return tiles;
}

void every_tile_comes_once(const TileOrder& order) {
  std::set<std::tuple<int, int, int>> seen;
  for (const WorkTile& tile : walk(order)) {
    CHECK(tile.m_block >= 0 && tile.m_block < order.num_m_blocks);
    CHECK(tile.head >= 0 && tile.head < order.heads);
    CHECK(tile.batch >= 0 && tile.batch < order.batch);
    CHECK(seen.insert({tile.m_block, tile.head, tile.batch}).second);
  }
  CHECK(static_cast<int>(seen.size()) == order.num_m_blocks * order.heads * order.batch);
}

// Of a (batch, head) pair.
int group_of(const HeadGroups& groups, int pair) {
  if (pair < groups.in_smaller) return pair / groups.smaller;
  const int before = groups.in_smaller > 0 ? groups.in_smaller / groups.smaller : 0;
  return before + (pair - groups.in_smaller) / groups.size;
}

int group_of(const TileOrder& order, const WorkTile& tile) {
  return group_of(order.groups, tile.batch * order.heads + tile.head);
}

// With a mask, later query blocks see more keys. A group ends before the next one begins.
void groups_come_whole_and_longest_first(const TileOrder& order) {
  const std::vector<WorkTile> tiles = walk(order);
  for (std::size_t i = 1; i < tiles.size(); ++i) {
    const int before = group_of(order, tiles[i - 1]);
    const int now = group_of(order, tiles[i]);
    CHECK(now >= before);
    if (now == before) CHECK(tiles[i].m_block <= tiles[i - 1].m_block);
  }
}

// Without one, the blocks of a head follow one another: at most two heads meet in a small window.
void blocks_of_a_head_follow_one_another(const TileOrder& order) {
  const std::vector<WorkTile> tiles = walk(order);
  std::set<std::pair<int, int>> finished;
  for (std::size_t i = 1; i < tiles.size(); ++i) {
    const std::pair<int, int> before{tiles[i - 1].batch, tiles[i - 1].head};
    const std::pair<int, int> now{tiles[i].batch, tiles[i].head};
    if (now != before) finished.insert(before);
    CHECK(finished.count(now) == 0);
  }
}

void orders_by_brute_force() {
  for (int m_blocks = 1; m_blocks <= 5; ++m_blocks) {
    for (int heads = 1; heads <= 6; ++heads) {
      for (int batch = 1; batch <= 3; ++batch) {
        for (int most = 1; most <= heads * batch; ++most) {
          check::context = std::to_string(m_blocks) + " blocks, " + std::to_string(heads) +
                           " heads, batch " + std::to_string(batch) + ", groups of " +
                           std::to_string(most);
          const HeadGroups groups = make_head_groups(heads * batch, most, 1);
          const TileOrder longest_first{m_blocks, heads, batch, groups, true};
          every_tile_comes_once(longest_first);
          groups_come_whole_and_longest_first(longest_first);
          const TileOrder in_turn{m_blocks, heads, batch, groups, false};
          every_tile_comes_once(in_turn);
          blocks_of_a_head_follow_one_another(in_turn);
        }
      }
    }
  }
}

// What the blocks of a static grid take, as scheduler.cuh has them: every tile once, a cluster's
// blocks neighbouring ones of one head, and one tile past a head's end where they are odd.
void clusters_share_the_tiles_out(int m_blocks, int heads, int batch, int cluster, int clusters) {
  const int groups = (m_blocks + cluster - 1) / cluster;
  const TileOrder order = make_tile_order(groups, heads, batch, 1, false, 0, 1);
  std::set<std::tuple<int, int, int>> seen;
  int past = 0;
  for (int block = 0; block < clusters * cluster; ++block) {
    const int first = block - block % cluster;  // of its cluster
    for (int i = block / cluster; i < order.num_tiles(); i += clusters) {
      const WorkTile tile = cluster_tile(order, i, cluster, block);
      const WorkTile beside = cluster_tile(order, i, cluster, first);
      CHECK(tile.head == beside.head && tile.batch == beside.batch);
      CHECK(tile.m_block == beside.m_block + (block - first));
      CHECK(tile.head >= 0 && tile.head < heads && tile.batch >= 0 && tile.batch < batch);
      past += tile.m_block >= m_blocks;
      CHECK(tile.m_block >= 0 && tile.m_block < groups * cluster);
      CHECK(seen.insert({tile.m_block, tile.head, tile.batch}).second);
    }
  }
  CHECK(past == (groups * cluster - m_blocks) * heads * batch);
  CHECK(static_cast<int>(seen.size()) == groups * cluster * heads * batch);
}

void clusters_by_brute_force() {
  for (int m_blocks = 1; m_blocks <= 7; ++m_blocks) {
    for (int heads = 1; heads <= 4; ++heads) {
      for (int batch = 1; batch <= 3; ++batch) {
        for (int cluster = 1; cluster <= 2; ++cluster) {
          for (int clusters = 1; clusters <= 9; ++clusters) {
            check::context = std::to_string(m_blocks) + " blocks, " + std::to_string(heads) +
                             " heads, batch " + std::to_string(batch) + ", " +
                             std::to_string(clusters) + " clusters of " + std::to_string(cluster);
            clusters_share_the_tiles_out(m_blocks, heads, batch, cluster, clusters);
          }
        }
      }
    }
  }
}

// As few groups as there can be, and none larger than another by more than a KV head.
void groups_are_few_and_equal() {
  for (int heads_kv = 0; heads_kv <= 40; ++heads_kv) {
    for (int most = 1; most <= 41; ++most) {
      for (int heads_per_kv : {1, 3}) {
        check::context = std::to_string(heads_kv) + " KV heads of " + std::to_string(heads_per_kv) +
                         ", at most " + std::to_string(most) + " a group";
        const HeadGroups groups = make_head_groups(heads_kv, most, heads_per_kv);
        CHECK(groups.size >= 1);  // dividing by it is safe
        const int heads = heads_kv * heads_per_kv;
        std::map<int, int> sizes;  // of each group
        for (int head = 0; head < heads; ++head) ++sizes[group_of(groups, head)];
        CHECK(static_cast<int>(sizes.size()) == (heads_kv + most - 1) / most);
        for (auto [group, size] : sizes) {
          CHECK(size % heads_per_kv == 0 && size <= most * heads_per_kv);
          CHECK(size <= groups.size && size >= groups.size - heads_per_kv);
          if (group > 0) CHECK(size >= sizes[group - 1]);
        }
      }
    }
  }
}

void groups_fit_in_l2() {
  for (int seqlen : {1, 128, 1000, 16384, 1 << 20}) {
    for (int heads_per_kv : {1, 4, 8}) {
      for (int heads : {8, 32, 128}) {
        check::context = "seqlen " + std::to_string(seqlen) + ", heads " + std::to_string(heads) +
                         ", " + std::to_string(heads_per_kv) + " a KV head";
        const std::int64_t bytes = static_cast<std::int64_t>(seqlen) * 256 * 2;
        const TileOrder order = make_tile_order(seqlen, heads, 2, 128, true, bytes, heads_per_kv);
        CHECK(order.num_m_blocks == (seqlen + 127) / 128);
        const int pairs = heads * 2, group = order.groups.size;
        CHECK(group >= 1 && group <= pairs && group % heads_per_kv == 0);
        const std::int64_t kv_heads = group / heads_per_kv;
        CHECK(kv_heads == 1 || kv_heads * bytes <= kL2GroupBytes);
        // One group less would not do.
        const int groups = (pairs + group - 1) / group;
        const bool alone = bytes * 2 > kL2GroupBytes;
        const std::int64_t fitting = alone ? 1 : kL2GroupBytes / bytes;
        CHECK(groups == 1 || (groups - 1) * fitting < pairs / heads_per_kv);
      }
    }
  }
}

// Blocks draw tiles as they get free, causal ones of as many key blocks as their place: none is
// idle for long at the end, whatever heads the groups leave over.
void multiprocessors_end_together() {
  constexpr int kMultiprocessors = 132;
  constexpr int kTileOverhead = 2;  // about as long as so many key blocks
  for (int m_blocks : {32, 64, 128}) {
    for (int most = 256 / m_blocks; most <= 1024 / m_blocks; ++most) {
      check::context = std::to_string(m_blocks) + " blocks, groups of " + std::to_string(most) +
                       " heads or fewer";
      const int heads = 2048 / m_blocks;
      const TileOrder order{m_blocks, heads, 1, make_head_groups(heads, most, 1), true};
      std::multiset<int> free_at;
      for (int i = 0; i < kMultiprocessors; ++i) free_at.insert(0);
      int sum = 0;
      for (const WorkTile& tile : walk(order)) {
        const int cost = kTileOverhead + tile.m_block + 1;
        free_at.insert(*free_at.begin() + cost);
        free_at.erase(free_at.begin());
        sum += cost;
      }
      CHECK(*free_at.rbegin() * kMultiprocessors < 1.03 * sum);
    }
  }
}

void empty_problems_have_no_tiles() {
  check::context = "empty";
  CHECK(make_tile_order(0, 8, 2, 128, true, 0, 1).num_tiles() == 0);
  CHECK(make_tile_order(64, 0, 2, 128, false, 0, 1).num_tiles() == 0);
  CHECK(make_tile_order(64, 8, 0, 128, true, 0, 1).num_tiles() == 0);
  // No keys at all: a group is never empty, so that dividing by it is safe.
  CHECK(make_tile_order(64, 8, 1, 128, true, 0, 1).groups.size >= 1);
}

}  // namespace

int main() {
  orders_by_brute_force();
  clusters_by_brute_force();
  groups_are_few_and_equal();
  groups_fit_in_l2();
  multiprocessors_end_together();
  empty_problems_have_no_tiles();
  return check::result();
}
