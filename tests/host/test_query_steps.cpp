// query_steps.h against loops, and the order of the adds that plans fix against a grid whose blocks
// start in order, as many at a time as there are places: each key block gets its turn. Blocks of a
// cluster start together and wait for each other's dS in every step. Persistent blocks draw their
// tiles, one ahead or not.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "backward/problem.h"
#include "check.h"
#include "hopper_attention/backward_budget.h"
#include "hopper_attention/query_steps.h"
#include "packed_batch.h"
#include "small_problem.h"

namespace {

using namespace hopper_attention;

using Args = hopper_attention_backward_args;
using Step = std::tuple<int, int, std::int64_t>;  // head, query block, block of the workspace

std::vector<Step> expected_steps(BlockRange blocks, int heads, int num_m_blocks, bool descending) {
  constexpr std::int64_t kFirst = 1000;
  std::vector<Step> steps;
  if (descending) {
    for (int m_block = blocks.end - 1; m_block >= blocks.begin; --m_block) {
      for (int head = 0; head < heads; ++head) {
        steps.push_back({head, m_block, kFirst + head * num_m_blocks + m_block});
      }
    }
    return steps;
  }
  for (int head = 0; head < heads; ++head) {
    for (int m_block = blocks.begin; m_block < blocks.end; ++m_block) {
      steps.push_back({head, m_block, kFirst + head * num_m_blocks + m_block});
    }
  }
  return steps;
}

void steps_are_those_of_two_loops() {
  for (int num_m_blocks = 1; num_m_blocks <= 5; ++num_m_blocks) {
    for (int begin = 0; begin < num_m_blocks; ++begin) {
      for (int end = begin; end <= num_m_blocks; ++end) {
        for (int heads = 0; heads <= 4; ++heads) {
          for (bool descending : {false, true}) {
            check::context = std::to_string(begin) + " to " + std::to_string(end) + " of " +
                             std::to_string(num_m_blocks) + ", heads " + std::to_string(heads) +
                             (descending ? ", descending" : "");
            const BlockRange blocks{begin, end};
            const std::vector<Step> expected =
                expected_steps(blocks, heads, num_m_blocks, descending);
            std::size_t count = 0;
            QuerySteps at(blocks, heads, num_m_blocks, descending, 1000);
            for (; !at.done() && count < expected.size(); at.advance(), ++count) {
              CHECK(Step(at.head(), at.m_block, at.block) == expected[count]);
              CHECK(at.last() == (count + 1 == expected.size()));
            }
            CHECK(at.done() && count == expected.size());
          }
        }
      }
    }
  }
}

// A block of the grid with what is left of its steps.
struct Running {
  int n_block;
  Mask mask;  // of its sequence
  QuerySteps at;
  int steps = 0;  // that it has made
};

BackwardPlan plan_of(const Args& args) {
  BackwardPlan plan;
  CHECK(plan_backward(args, &plan).ok());
  return plan;
}

// The grid's blocks in the order in which they start.
std::vector<Running> dense_grid(const BackwardPlan& plan, const Args& args) {
  std::vector<Running> grid;
  const int group = args.heads / args.heads_kv;
  const int cluster = cluster_blocks(plan.config), keys = cluster_keys(plan.config);
  for (int block_idx = 0; block_idx < plan.key_grid; ++block_idx) {
    const WorkTile work = plan.order(block_idx / cluster);
    const int own_cluster = key_block(plan.order, work, plan.last_first);
    const int begin = own_cluster * keys;
    const int end = std::min(begin + keys, args.seqlen_k);
    const std::int64_t pair = static_cast<std::int64_t>(work.batch) * args.heads_kv + work.head;
    grid.push_back({own_cluster * cluster + block_idx % cluster,
                    plan.mask,
                    {query_blocks(plan.mask, begin, end, plan.config.tile_m), group,
                     plan.num_m_blocks, plan.descending, pair * group * plan.num_m_blocks}});
  }
  return grid;
}

// As list_keys.cuh makes it in a fixed order: of a group the sequences of many key blocks first,
// otherwise in any order, and a sequence's blocks, or clusters, from the last to the first.
std::vector<KeyEntry> ordered_list(const BackwardPlan& plan, const PackedLengths& lengths,
                                   int group) {
  std::vector<int> sequences;
  for (int i = 0; i <= lengths.batch; ++i) {
    if (plan.packed_order.group_of(sequence_at(lengths, i).q_begin) == group)
      sequences.push_back(i);
  }
  auto blocks_of = [&](int i) {
    const int keys = cluster_keys(plan.config);
    return (sequence_at(lengths, i).keys + keys - 1) / keys;
  };
  std::shuffle(sequences.begin(), sequences.end(), generator);
  std::stable_sort(sequences.begin(), sequences.end(), [&](int a, int b) {
    return cost_bucket(blocks_of(a)) > cost_bucket(blocks_of(b));
  });
  std::vector<KeyEntry> list;
  for (int i : sequences) {
    const Sequence own = sequence_at(lengths, i);
    const int first_block = first_query_block(own.q_begin, i, plan.config.tile_m);
    for (int n_block = blocks_of(i) - 1; n_block >= 0; --n_block) {
      list.push_back({n_block, first_block, own.q_begin, own.seqlen_q, own.k_begin, own.seqlen_k,
                      own.keys, 0});
    }
  }
  return list;
}

std::vector<Running> packed_grid(const BackwardPlan& plan, const Args& args,
                                 const PackedLengths& lengths) {
  std::vector<Running> grid;
  const int heads = args.heads / args.heads_kv, cluster = cluster_blocks(plan.config);
  for (int group = 0; group < plan.packed_order.num_groups; ++group) {
    const std::vector<KeyEntry> list = ordered_list(plan, lengths, group);
    const int entries = static_cast<int>(list.size());
    for (int block_idx = 0; block_idx < entries * args.heads_kv * cluster; ++block_idx) {
      const PackedOrder::Work work = plan.packed_order(block_idx / cluster, entries);
      const KeyEntry& entry = list[work.entry];
      const Mask mask = sequence_mask(plan.mask, entry.seqlen_q, entry.seqlen_k);
      const std::int64_t first = std::int64_t{work.head} * heads * plan.num_m_blocks;
      grid.push_back(
          {entry.n_block * cluster + block_idx % cluster,
           mask,
           {tile_query_blocks(mask, entry.n_block, plan.config.tile_m, cluster_keys(plan.config)),
            heads, plan.num_m_blocks, plan.descending, first + entry.first_block}});
    }
  }
  CHECK(static_cast<int>(grid.size()) <= plan.key_grid);
  return grid;
}

// What has been added to a query block of the workspace.
struct Added {
  std::set<int> key_blocks;
  int expected;  // of these
};

// Whole clusters, of which the last one may have a block without keys.
int count_key_blocks(const BackwardPlan& plan, const Mask& mask, int m_block) {
  const int cluster = cluster_blocks(plan.config);
  const BlockRange seen =
      tile_key_blocks(mask, m_block, plan.config.tile_m, cluster * plan.config.tile_n);
  return cluster * (seen.end - seen.begin);
}

// Adds to the query block of the next step if its turn has come.
bool makes_a_step(const BackwardPlan& plan, Running& block, std::map<std::int64_t, Added>& added) {
  const BackwardConfig& config = plan.config;
  const unsigned int own = add_turn(block.mask, block.n_block, block.at.m_block, config.tile_m,
                                    config.tile_n, plan.last_first, cluster_blocks(config));
  Added& to = added[block.at.block];
  const auto so_far = static_cast<unsigned int>(to.key_blocks.size());
  if (!turn_has_come(so_far, own, cluster_blocks(config))) return false;
  to.expected = count_key_blocks(plan, block.mask, block.at.m_block);
  CHECK(to.key_blocks.insert(block.n_block).second);
  block.at.advance();
  ++block.steps;
  return true;
}

void check_all_added(const BackwardPlan& plan, const std::map<std::int64_t, Added>& added) {
  for (const auto& [block, to] : added) {
    CHECK(block >= 0 && block < plan.query_grid);
    CHECK(static_cast<int>(to.key_blocks.size()) == to.expected);
  }
}

// Persistent blocks, one a place: each has drawn a tile or two, and takes them in that order. Which
// block comes when, and whether it draws its next tile while it is at work, is left to chance; some
// never come.
void all_tiles_get_their_turns(const BackwardPlan& plan, std::vector<Running> tiles, int places) {
  const auto num_blocks = std::min(static_cast<std::size_t>(places), tiles.size());
  std::vector<std::deque<std::size_t>> drawn(num_blocks);
  std::vector<std::size_t> order(num_blocks);
  std::iota(order.begin(), order.end(), 0);
  std::map<std::int64_t, Added> added;
  std::size_t tickets = 0,
              late = static_cast<std::size_t>(draw(0, static_cast<int>(num_blocks) / 2));
  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(order.begin(), order.end(), generator);
    for (std::size_t block : order) {
      if (block < late) continue;
      std::deque<std::size_t>& own = drawn[block];
      const bool draws = own.empty() || (own.size() == 1 && draw(0, 2) > 0);
      if (draws && tickets < tiles.size()) {
        own.push_back(tickets++);
        moved = true;
      }
      if (own.empty()) continue;
      Running& tile = tiles[own.front()];
      if (!tile.at.done() && !makes_a_step(plan, tile, added)) continue;
      if (tile.at.done()) own.pop_front();
      moved = true;
    }
  }
  CHECK(tickets == tiles.size());
  for (const Running& tile : tiles) CHECK(tile.at.done());
  check_all_added(plan, added);
}

// Goes on for as long as any block that runs can, one step a round at most, and with its cluster's
// others at the same step or one before.
void all_get_their_turns(const BackwardPlan& plan, std::vector<Running> grid, int places) {
  if (is_persistent(plan.config)) return all_tiles_get_their_turns(plan, grid, places);
  const std::size_t cluster = static_cast<std::size_t>(cluster_blocks(plan.config));
  const std::size_t room = std::max(static_cast<std::size_t>(places), cluster);
  std::map<std::int64_t, Added> added;
  std::vector<std::size_t> running;  // of the grid
  std::size_t next = 0;
  bool moved = true;
  CHECK(grid.size() % cluster == 0);
  while (moved) {
    moved = false;
    while (next < grid.size() && running.size() + (next % cluster == 0 ? cluster : 1) <= room) {
      running.push_back(next++);
    }
    for (std::size_t i = 0; i < running.size();) {
      Running& block = grid[running[i]];
      if (block.at.done()) {
        running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
        moved = true;
        continue;
      }
      int slowest = block.steps;
      for (std::size_t peer = 0; peer < cluster; ++peer) {
        slowest = std::min(slowest, grid[running[i] / cluster * cluster + peer].steps);
      }
      if (block.steps <= slowest + 1 && makes_a_step(plan, block, added)) moved = true;
      ++i;
    }
  }
  CHECK(running.empty() && next == grid.size());
  check_all_added(plan, added);
}

bool sees_any(const Mask& mask, int m_block, int tile_m, int key_begin, int key_end) {
  for (int row = m_block * tile_m; row < std::min((m_block + 1) * tile_m, mask.seqlen_q); ++row) {
    for (int key = key_begin; key < key_end; ++key) {
      if (key >= mask.first_key(row) && key < mask.end_key(row)) return true;
    }
  }
  return false;
}

// By brute force: of the clusters that see a query block, both blocks of the first have turns 0 and
// 1, those of the second 2 and 3, in either direction, with whichever of the two first; and no
// other turn has come by then.
void clusters_have_their_turns_together() {
  constexpr int kTileM = 3, kTileN = 2, kCluster = 2, kKeys = kCluster * kTileN;
  for (int seqlen_q = 1; seqlen_q <= 9; ++seqlen_q) {
    for (int seqlen_k = 1; seqlen_k <= 11; ++seqlen_k) {
      for (const auto& [left, right] : {std::pair{-1, -1}, {-1, 0}, {2, 0}, {0, 3}, {4, 4}}) {
        const Mask mask = make_mask(seqlen_q, seqlen_k, false, left, right);
        for (int m_block = 0; m_block * kTileM < seqlen_q; ++m_block) {
          check::context = std::to_string(seqlen_q) + " x " + std::to_string(seqlen_k) +
                           ", window (" + std::to_string(left) + ", " + std::to_string(right) +
                           "), query block " + std::to_string(m_block);
          std::vector<int> seen;  // clusters
          for (int cluster = 0; cluster * kKeys < seqlen_k; ++cluster) {
            const int begin = cluster * kKeys, end = std::min(begin + kKeys, seqlen_k);
            if (sees_any(mask, m_block, kTileM, begin, end)) seen.push_back(cluster);
          }
          for (bool last_first : {false, true}) {
            unsigned int before = 0;
            if (last_first) std::reverse(seen.begin(), seen.end());
            for (int cluster : seen) {
              for (int n_block = cluster * kCluster; n_block < (cluster + 1) * kCluster;
                   ++n_block) {
                const unsigned int own =
                    add_turn(mask, n_block, m_block, kTileM, kTileN, last_first, kCluster);
                CHECK(own == before);
                for (unsigned int added = 0; added <= 2 * seen.size(); ++added) {
                  const bool now = added == before || added == before + 1;
                  CHECK(turn_has_come(added, own, kCluster) == now);
                }
              }
              before += kCluster;
            }
          }
        }
      }
    }
  }
}

void every_plan_in_a_fixed_order_comes_to_an_end() {
  struct Window {
    int causal, left, right;
  };
  for (int head_dim : {64, 128, 192, 256}) {
    for (const auto& [seqlen_q, seqlen_k] : {std::pair{700, 700}, {300, 900}, {900, 300}, {1, 1}}) {
      for (const Window& w : {Window{0, -1, -1}, {1, -1, -1}, {0, 130, 70}, {1, 60, -1}}) {
        for (int heads_kv : {1, 2, 6}) {
          for (int places : {1, 2, 5, 132}) {
            Args args = small_problem<Args>();
            args.head_dim = args.head_dim_v = head_dim;
            args.seqlen_q = seqlen_q;
            args.seqlen_k = seqlen_k;
            args.heads = 6;
            args.heads_kv = heads_kv;
            args.causal = w.causal;
            args.window_left = w.left;
            args.window_right = w.right;
            args.deterministic = 1;
            check::context = "d" + std::to_string(head_dim) + ", " + std::to_string(seqlen_q) +
                             " x " + std::to_string(seqlen_k) + ", causal " +
                             std::to_string(w.causal) + ", window (" + std::to_string(w.left) +
                             ", " + std::to_string(w.right) + "), heads_kv " +
                             std::to_string(heads_kv) + ", places " + std::to_string(places);
            const BackwardPlan plan = plan_of(args);
            const std::vector<Running> grid = dense_grid(plan, args);
            CHECK(static_cast<int>(grid.size()) == plan.key_grid);
            all_get_their_turns(plan, grid, places);
          }
        }
      }
    }
  }
}

// Sequences without rows or keys, or with some that they do not use, among them.
void every_packed_plan_in_a_fixed_order_comes_to_an_end() {
  for (int round = 0; round < 400; ++round) {
    const Batch batch = draw_batch(draw(0, 3) == 0 ? 3 : 500);
    const PackedLengths lengths = batch.lengths(draw(0, 1) == 1);
    Args args = small_problem<Args>();
    args.packed = 1;
    args.batch = lengths.batch;
    args.seqlen_q = lengths.total_q;
    args.seqlen_k = lengths.total_k;
    constexpr int kHeadDims[] = {64, 128, 192, 256};
    args.head_dim = args.head_dim_v = kHeadDims[draw(0, 3)];
    args.heads = 6;
    args.heads_kv = draw(0, 1) == 1 ? 6 : 2;
    args.causal = draw(0, 1);
    args.window_left = draw(0, 1) == 1 ? draw(0, 200) : -1;
    args.window_right = draw(0, 1) == 1 ? draw(0, 200) : -1;
    args.softcap = draw(0, 3) == 0 ? 30.0f : 0.0f;
    args.deterministic = 1;
    BackwardPlan plan = plan_of(args);
    CHECK(plan.last_first && !plan.descending);
    if (draw(0, 1) == 1) {  // as where L2 does not hold all
      plan.packed_order.num_groups = 3;
      plan.packed_order.group_keys = lengths.total_q / 3 + 1;
      plan.packed_order.head_groups = make_head_groups(args.heads_kv, draw(1, args.heads_kv), 1);
    }
    for (int places : {1, 3, 132}) {
      check::context = "packed, round " + std::to_string(round) + ", " +
                       std::to_string(lengths.batch) + " sequences, places " +
                       std::to_string(places);
      all_get_their_turns(plan, packed_grid(plan, args, lengths), places);
    }
  }
}

}  // namespace

int main() {
  steps_are_those_of_two_loops();
  clusters_have_their_turns_together();
  every_plan_in_a_fixed_order_comes_to_an_end();
  every_packed_plan_in_a_fixed_order_comes_to_an_end();
  return check::result();
}
