// The turns of the 16-bit forward kernel, by simulation: a block's producer and consumers step
// through their tiles' waits and arrivals (load.cuh, mma.cuh), where a consumer's first product of
// a tile takes no turn. Every consumer must take as many, and all must end.
#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"
#include "hopper_attention/block_range.h"

namespace {

using namespace hopper_attention;

constexpr int kTileSlots = 2;

struct Shape {
  int consumers;
  int rows;  // of a consumer
  int tile_n;
  int stages;
  bool differ;  // consumers have key ranges of their own (consumers_differ)
};

struct Tile {
  BlockRange blocks;
  std::vector<BlockRange> own;  // a consumer's each
};

using Rule = bool (*)(BlockRange blocks, BlockRange own, int n_block);

// What the producer of K and V waits for and does, that of Q, both sides, and a consumer.
enum class Op {
  kTell,
  kLoadK,
  kLoadV,
  kAwaitO,
  kLoadQ,
  kTile,
  kReleaseTile,
  kQ,
  kK,
  kV,
  kTurn,
  kPass,
  kReleaseK,
  kReleaseV,
  kReleaseQ,
  kSendO,
};

struct Step {
  Op op;
  int consumer;  // whose Q a kLoadQ brings
};

struct Agent {
  int consumer;  // or -1
  int sink;      // place among those that take tiles, or -1
  std::vector<Step> steps;
  std::size_t at = 0;

  void add(Op op, int of = -1) { steps.push_back({op, of}); }
};

// What the barriers hold: how often each was completed. Rings are counted through, not around.
struct Barriers {
  Barriers(const Shape& shape, int sinks)
      : stages(shape.stages),
        k_released(shape.consumers),
        v_released(shape.consumers),
        k_used(shape.consumers),
        v_used(shape.consumers),
        q_loaded(shape.consumers),
        q_released(shape.consumers),
        q_used(shape.consumers),
        o_sent(shape.consumers),
        turn(shape.consumers),
        turns(shape.consumers),
        taken(sinks),
        tiles_released(sinks) {
    turn[0] = 1;
  }

  int stages, told = 0, k_loaded = 0, v_loaded = 0, o_awaited = 0;
  std::vector<int> k_released, v_released, k_used, v_used, q_loaded, q_released, q_used, o_sent;
  std::vector<int> turn;   // arrivals of a consumer's named barrier: one at most
  std::vector<int> turns;  // that a consumer has taken
  std::vector<int> taken, tiles_released;
  bool twice = false;  // a turn was passed to one who still had one: the barrier's count is off
};

int least(const std::vector<int>& counts) {
  return *std::min_element(counts.begin(), counts.end());
}

bool produce(Barriers& b, const Step& step) {
  switch (step.op) {
    case Op::kTell:
      return b.told < least(b.tiles_released) + kTileSlots && ++b.told;
    case Op::kLoadK:
      return b.k_loaded < least(b.k_released) + b.stages && ++b.k_loaded;
    case Op::kLoadV:
      return b.v_loaded < least(b.v_released) + b.stages && ++b.v_loaded;
    case Op::kAwaitO:  // of the tile before
      if (least(b.o_sent) < b.o_awaited) return false;
      ++b.o_awaited;
      return true;
    default:
      return b.q_loaded[step.consumer] == b.q_released[step.consumer] &&
             ++b.q_loaded[step.consumer];
  }
}

bool consume(Barriers& b, Op op, int c) {
  const int next = (c + 1) % static_cast<int>(b.turn.size());
  switch (op) {
    case Op::kQ:
      return b.q_used[c] < b.q_loaded[c] && ++b.q_used[c];
    case Op::kK:
      return b.k_used[c] < b.k_loaded && ++b.k_used[c];
    case Op::kV:
      return b.v_used[c] < b.v_loaded && ++b.v_used[c];
    case Op::kTurn:
      if (b.turn[c] == 0) return false;
      --b.turn[c];
      return ++b.turns[c];
    case Op::kPass:
      b.twice = b.twice || b.turn[next] > 0;
      return ++b.turn[next];
    case Op::kReleaseK:
      return ++b.k_released[c];
    case Op::kReleaseV:
      return ++b.v_released[c];
    case Op::kReleaseQ:
      return ++b.q_released[c];
    default:
      return ++b.o_sent[c];
  }
}

// Whether the agent could take its next step.
bool advance(Barriers& b, Agent& agent) {
  if (agent.at == agent.steps.size()) return false;
  const Step& step = agent.steps[agent.at];
  bool done;
  if (step.op == Op::kTile) {
    done = b.taken[agent.sink] < b.told && ++b.taken[agent.sink];
  } else if (step.op == Op::kReleaseTile) {
    done = ++b.tiles_released[agent.sink];
  } else {
    done = agent.consumer < 0 ? produce(b, step) : consume(b, step.op, agent.consumer);
  }
  agent.at += done;
  return done;
}

void load_tile(Agent& keys, Agent& queries, const Shape& shape, const Tile& tile) {
  const BlockRange blocks = tile.blocks;
  keys.add(Op::kTell);
  for (int n_block = blocks.end - 1; n_block >= blocks.begin - 1; --n_block) {
    if (n_block >= blocks.begin) keys.add(Op::kLoadK);
    if (n_block == std::max(blocks.end - 2, blocks.begin - 1)) keys.add(Op::kAwaitO);
    if (n_block + 1 < blocks.end) keys.add(Op::kLoadV);
  }
  queries.add(Op::kTile);
  queries.add(Op::kReleaseTile);
  for (int consumer = 0; consumer < shape.consumers; ++consumer) {
    queries.add(Op::kLoadQ, consumer);
  }
}

void attend_tile(Agent& consumer, const Tile& tile, Rule takes) {
  const BlockRange blocks = tile.blocks, own = tile.own[consumer.consumer];
  auto add = [&](std::initializer_list<Op> ops) {
    for (Op op : ops) consumer.add(op);
  };
  auto skip = [&](int n_block, int begin) {
    for (; n_block >= begin; --n_block) {
      add({Op::kK});
      if (takes(blocks, own, n_block)) add({Op::kTurn, Op::kPass});
      add({Op::kReleaseK, Op::kV, Op::kReleaseV});
    }
  };
  add({Op::kTile, Op::kQ});
  skip(blocks.end - 1, own.end);
  if (!own.empty()) {
    add({Op::kK, Op::kReleaseK});  // the free one
    for (int n_block = own.end - 2; n_block >= own.begin; --n_block) {
      add({Op::kK, Op::kTurn, Op::kV, Op::kPass, Op::kReleaseK, Op::kReleaseV});
    }
  }
  add({Op::kReleaseQ});
  if (!own.empty()) {
    add({Op::kV, Op::kReleaseV});
    skip(own.begin - 1, blocks.begin);
  }
  add({Op::kSendO, Op::kReleaseTile});
}

// Runs a block's tiles to the end, agents in turn from the first'th on. False: some wait for ever,
// or a turn was passed twice.
bool all_end(const Shape& shape, const std::vector<Tile>& tiles, Rule takes, int first) {
  std::vector<Agent> agents{{-1, -1, {}}, {-1, 0, {}}};
  for (int c = 0; c < shape.consumers; ++c) agents.push_back({c, c + 1, {}});
  for (const Tile& tile : tiles) {
    load_tile(agents[0], agents[1], shape, tile);
    for (int c = 0; c < shape.consumers; ++c) attend_tile(agents[2 + c], tile, takes);
  }
  Barriers barriers(shape, 1 + shape.consumers);
  const int count = static_cast<int>(agents.size());
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < count; ++i) {
      while (advance(barriers, agents[(first + i) % count])) moved = true;
    }
  }
  int turns = 0;
  for (const Tile& tile : tiles) turns += std::max(tile.blocks.end - tile.blocks.begin - 1, 0);
  bool ended = !barriers.twice;
  for (const Agent& agent : agents) ended = ended && agent.at == agent.steps.size();
  for (int taken : barriers.turns) ended = ended && taken == turns;
  return ended;
}

// The tiles of one head, with the key blocks that mma.cuh's own_blocks gives each consumer.
std::vector<Tile> tiles_of(const Shape& shape, const Mask& mask) {
  std::vector<Tile> tiles;
  const int tile_m = shape.consumers * shape.rows;
  for (int row = 0; row < mask.seqlen_q; row += tile_m) {
    Tile tile;
    tile.blocks = key_blocks(mask, row, std::min(row + tile_m, mask.seqlen_q), shape.tile_n);
    const int begin = tile.blocks.begin;
    for (int first = row; first < row + tile_m; first += shape.rows) {
      BlockRange own = tile.blocks;
      if (shape.differ) {
        const int end = std::min(first + shape.rows, mask.seqlen_q);
        own = first < end ? key_blocks(mask, first, end, shape.tile_n) : BlockRange{0, 0};
        if (own.empty()) own = {begin, begin};
      }
      tile.own.push_back(own);
    }
    tiles.push_back(tile);
  }
  return tiles;
}

template <class Each>
void each_problem(Each each) {
  for (const Shape& shape :
       {Shape{2, 4, 8, 2, false}, Shape{2, 4, 8, 2, true}, Shape{2, 4, 3, 2, true},
        Shape{3, 4, 8, 2, true}, Shape{3, 4, 4, 3, true}, Shape{3, 4, 4, 6, true}}) {
    for (int seqlen_q : {1, 4, 5, 8, 9, 13, 24, 41}) {
      for (int seqlen_k : {0, 1, 8, 9, 16, 17, 24, 40}) {
        for (int left : {-1, 0, 3, 20}) {
          for (int right : {-1, 0, 2, 20}) {
            check::context = std::to_string(shape.consumers) + " consumers, blocks of " +
                             std::to_string(shape.tile_n) + ", " + std::to_string(seqlen_q) +
                             " queries, " + std::to_string(seqlen_k) + " keys, window (" +
                             std::to_string(left) + ", " + std::to_string(right) + ")";
            each(shape, tiles_of(shape, make_mask(seqlen_q, seqlen_k, false, left, right)));
          }
        }
      }
    }
  }
}

void consumers_take_as_many_turns_and_end() {
  each_problem([](const Shape& shape, std::vector<Tile> tiles) {
    const std::vector<Tile> again = tiles;  // a second head's, longest first
    tiles.insert(tiles.end(), again.rbegin(), again.rend());
    for (int first = 0; first < 2 + shape.consumers; ++first) {
      CHECK(all_end(shape, tiles, takes_turn, first));
    }
  });
}

// That the simulation sees a turn too many or too few: a hang of the kernel.
void uneven_turns_are_found() {
  const Rule all_where_none_is_seen = [](BlockRange, BlockRange own, int n_block) {
    return n_block != own.end - 1;  // never so where own is empty
  };
  const Rule none_where_none_is_seen = [](BlockRange blocks, BlockRange own, int n_block) {
    return !own.empty() && takes_turn(blocks, own, n_block);
  };
  int uneven = 0;
  each_problem([&](const Shape& shape, const std::vector<Tile>& tiles) {
    bool too_many = false, too_few = false;
    for (const Tile& tile : tiles) {
      for (BlockRange own : tile.own) {
        too_many = too_many || (own.empty() && !tile.blocks.empty());
        too_few = too_few || (own.empty() && tile.blocks.end - tile.blocks.begin > 1);
      }
    }
    uneven += too_many;
    for (int first = 0; first < 2 + shape.consumers; ++first) {
      CHECK(all_end(shape, tiles, all_where_none_is_seen, first) == !too_many);
      CHECK(all_end(shape, tiles, none_where_none_is_seen, first) == !too_few);
    }
  });
  CHECK(uneven > 100);
}

}  // namespace

int main() {
  consumers_take_as_many_turns_and_end();
  uneven_turns_are_found();
  return check::result();
}
