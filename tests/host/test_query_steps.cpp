// query_steps.h against loops, and the order of the adds that plans fix against a grid whose blocks
// start in order, as many at a time as there are places: each key block gets its turn.
#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "backward/problem.h"
#include "check.h"
#include "hopper_attention/query_steps.h"
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
  QuerySteps at;
};

Running start(const BackwardPlan& plan, const Args& args, int work_idx) {
  const WorkTile work = plan.order(work_idx);
  const int n_block = key_block(plan.order, work, plan.last_first);
  const int begin = n_block * plan.config.tile_n;
  const int end = std::min(begin + plan.config.tile_n, args.seqlen_k);
  const int group = args.heads / args.heads_kv;
  const std::int64_t pair = static_cast<std::int64_t>(work.batch) * args.heads_kv + work.head;
  return {n_block,
          {query_blocks(plan.mask, begin, end, plan.config.tile_m), group, plan.num_m_blocks,
           plan.descending, pair * group * plan.num_m_blocks}};
}

// Goes on for as long as any block that runs can, one step a round at most.
void all_get_their_turns(const Args& args, int places) {
  BackwardPlan plan;
  CHECK(plan_backward(args, &plan).ok());
  std::map<std::int64_t, unsigned int> turns;
  std::map<std::int64_t, std::set<int>> added;
  std::vector<Running> running;
  int next = 0;
  bool moved = true;
  while (moved) {
    moved = false;
    while (next < plan.key_grid && static_cast<int>(running.size()) < places) {
      running.push_back(start(plan, args, next++));
    }
    for (std::size_t i = 0; i < running.size();) {
      Running& block = running[i];
      const bool done = block.at.done();
      if (done) {
        running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
        moved = true;
        continue;
      }
      const unsigned int own = add_turn(plan.mask, block.n_block, block.at.m_block,
                                        plan.config.tile_m, plan.config.tile_n, plan.last_first);
      if (turns[block.at.block] == own) {
        CHECK(added[block.at.block].insert(block.n_block).second);
        ++turns[block.at.block];
        block.at.advance();
        moved = true;
      }
      ++i;
    }
  }
  CHECK(running.empty() && next == plan.key_grid);
  for (const auto& [block, blocks] : added) {
    const int m_block = static_cast<int>(block % plan.num_m_blocks);
    const int row_end = std::min((m_block + 1) * plan.config.tile_m, args.seqlen_q);
    const BlockRange seen =
        key_blocks(plan.mask, m_block * plan.config.tile_m, row_end, plan.config.tile_n);
    CHECK(static_cast<int>(blocks.size()) == seen.end - seen.begin);
  }
}

void every_plan_in_a_fixed_order_comes_to_an_end() {
  struct Window {
    int causal, left, right;
  };
  for (int head_dim : {64, 128, 256}) {
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
            all_get_their_turns(args, places);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  steps_are_those_of_two_loops();
  every_plan_in_a_fixed_order_comes_to_an_end();
  return check::result();
}
