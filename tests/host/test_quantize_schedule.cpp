// In which order the quantizer's tiles come, against brute force.
#include <algorithm>
#include <climits>
#include <cstdlib>
#include <random>
#include <vector>

#include "quantize_call.h"

namespace {

using namespace hopper_attention;

// Of a pass over a tensor, the ticket of each tile; -1 where it is not drawn once.
std::vector<int> tickets_of(const QuantizeParams& params, QuantizePass pass, int which) {
  const QuantizeSchedule& schedule = params.schedule;
  std::vector<int> tickets(params.tensors[which].order.num_tiles, -1);
  std::int32_t segment = 0;
  for (int ticket = 0; ticket < schedule.num_tickets; ++ticket) {
    const auto at = schedule(ticket, segment);
    std::int32_t from_start = 0;
    const auto again = schedule(ticket, from_start);
    CHECK(again.stream == at.stream && again.tile == at.tile);
    const QuantizeStream& stream = schedule.streams[at.stream];
    if (stream.pass != pass || stream.which != which) continue;
    int& place = tickets.at(at.tile);
    CHECK(place == -1);
    place = ticket;
  }
  return tickets;
}

// Whether every tile of `later` comes after those of `first` of its head, or of all heads.
bool follows(const HeadOrder& order, const std::vector<int>& first, const std::vector<int>& later,
             bool all) {
  for (int tile = 0; tile < order.num_tiles; ++tile) {
    for (int before = 0; before < order.num_tiles; ++before) {
      const auto mine = order(tile), its = order(before);
      const bool waits = all || (mine.head == its.head && mine.sequence == its.sequence);
      if (waits && first[before] >= later[tile]) return false;
    }
  }
  return true;
}

// Each tile of each pass is drawn once, and after all that it waits for.
void tickets_are_sound(const QuantizeParams& params) {
  int tickets = 0;
  std::vector<int> of_v;
  for (int which : {kV, kK, kQ}) {
    const QuantizeTensor& tensor = params.tensors[which];
    const bool whole = tensor.scale == ScaleKind::kTensor;
    std::vector<int> before;
    for (const auto pass : {QuantizePass::kAmax, QuantizePass::kQuantize}) {
      if (pass == QuantizePass::kAmax && !tensor.find_amax) continue;
      const std::vector<int> mine = tickets_of(params, pass, which);
      CHECK(std::count(mine.begin(), mine.end(), -1) == 0);
      const bool all = whole && pass == QuantizePass::kQuantize;
      if (!before.empty()) CHECK(follows(tensor.order, before, mine, all));
      // K's tiles finish the factors of V's tokens.
      const bool finishes = which == kK && pass == QuantizePass::kQuantize &&
                            params.tensors[kV].scale == ScaleKind::kToken;
      if (finishes) CHECK(follows(tensor.order, of_v, mine, true));
      before = mine;
      tickets += tensor.order.num_tiles;
    }
    if (which == kV) of_v = before;
  }
  CHECK(tickets == params.schedule.num_tickets);
}

// What a block has without a counter waits for nothing: it is the last pass over Q or, where Q is
// measured, a pass that comes first and raises no maxima of channels.
void early_tickets(const QuantizeParams& params, const QuantizeBlocks& blocks) {
  const QuantizeTensor &q = params.tensors[kQ], &v = params.tensors[kV];
  const int at_once = blocks.count * blocks.teams, count = params.first_draws * at_once;
  const int most = params.smooth_k ? kEarlyDrawsOfMean : kEarlyDraws;
  const int measured = v.order.num_tiles > 0 ? kV : kQ;
  const bool measures = (v.find_amax && v.scale != ScaleKind::kChannel) || measured == kQ;
  CHECK(!q.find_amax || params.first_draws <= (measures ? kEarlyDraws : 0));
  const bool enough = v.scale == ScaleKind::kTensor && v.order.num_tiles >= kEarlyDraws * at_once;
  CHECK(!q.find_amax || !enough || params.first_draws == kEarlyDraws);
  CHECK(q.find_amax || params.first_draws == most || q.order.num_tiles - count < at_once);
  std::int32_t segment = 0;
  for (int ticket = 0; ticket < count; ++ticket) {
    const QuantizeStream& stream = params.schedule.streams[params.schedule(ticket, segment).stream];
    const auto first = q.find_amax ? std::pair{measured, QuantizePass::kAmax}
                                   : std::pair{int{kQ}, QuantizePass::kQuantize};
    CHECK(stream.which == first.first && stream.pass == first.second);
  }
}

// While the same streams run, whoever has every other ticket has as many of each as of any other.
void fair_turns(const QuantizeSchedule& schedule) {
  for (int i = 0; i < schedule.num_segments; ++i) {
    const bool last = i + 1 == schedule.num_segments;
    const int end = last ? schedule.num_tickets : schedule.segments[i + 1].first_ticket;
    int taken[2][QuantizeSchedule::kMaxStreams] = {};
    std::int32_t segment = i;
    for (int t = schedule.segments[i].first_ticket; t < end; ++t) {
      ++taken[t % 2][schedule(t, segment).stream];
      for (int n = 0; n < schedule.num_streams; ++n) CHECK(std::abs(taken[0][n] - taken[1][n]) < 3);
    }
  }
}

// When passes over a tensor start.
std::vector<int> starts(const QuantizeSchedule& schedule, int which) {
  std::vector<int> found;
  for (int i = 0; i < schedule.num_streams; ++i) {
    if (schedule.streams[i].which == which) found.push_back(schedule.streams[i].start);
  }
  return found;
}

// Groups hold as many bytes at every head dimension; one pass takes all heads side by side, and so
// do passes over what shares a scale.
void groups() {
  for (int head_dim : {64, 96, 128, 256}) {
    QuantizePlan plan;
    Call call;
    auto& a = call.args;
    a.heads = a.heads_kv = 32;
    a.head_dim = a.head_dim_v = head_dim;
    a.seqlen_q = a.seqlen_k = 128 * 64;
    check::context = "groups of " + std::to_string(head_dim);
    CHECK(plan_quantize(a, &plan).ok());
    const auto group = [&](int which) { return plan.params.tensors[which].order.by_group.divisor; };
    const int heads = head_dim == 64 ? 4 : head_dim == 256 ? 1 : 2;
    CHECK(group(kV) == heads && group(kQ) == 32 && group(kK) == 32);
    schedule_quantize({100, 1, 1}, &plan);
    const int first = 100 * kEarlyDraws;
    CHECK(starts(plan.params.schedule, kV) == (std::vector<int>{first, first + heads * 64 + 100}));
    a.v_scale = HOPPER_ATTENTION_SCALE_TENSOR;
    CHECK(plan_quantize(a, &plan).ok() && group(kV) == 32);
  }
}

// Beside V's two passes is the rest of Q, or K, or nobody; a K that was read before is the first,
// backwards, unless it finishes factors of V's tokens.
void beside_v() {
  for (int head_dim : {64, 128, 256}) {
    for (int blocks : {100, 500}) {  // 4,096 tiles: of Q much is left, or little
      for (int smooth : {0, 1}) {
        QuantizePlan plan;
        Call call;
        auto& a = call.args;
        a.batch = 1;
        a.heads = a.heads_kv = 32;
        a.head_dim = a.head_dim_v = head_dim;
        a.seqlen_q = a.seqlen_k = 128 * 128;
        a.smooth_k = smooth;
        check::context = "beside V at " + std::to_string(head_dim) + ", " + std::to_string(blocks) +
                         " blocks" + (smooth ? ", smooth" : "");
        CHECK(plan_quantize(a, &plan).ok());
        schedule_quantize({blocks, 1, 1}, &plan);
        const QuantizeSchedule& s = plan.params.schedule;
        const int all = 32 * 128, early = blocks * (smooth ? kEarlyDrawsOfMean : kEarlyDraws);
        CHECK(early < all);
        const bool k_beside = head_dim == 256;
        const bool q_beside = head_dim == 128 || (head_dim == 64 && all - early < blocks);
        const int of_v = early + (smooth && !k_beside ? all : 0);
        CHECK(starts(s, kV).at(0) == of_v);
        CHECK(starts(s, kK) == std::vector<int>{k_beside || smooth ? early : of_v + all});
        const int of_q = q_beside ? of_v : k_beside || smooth ? of_v + all : of_v + 2 * all;
        CHECK(starts(s, kQ) == (std::vector<int>{0, of_q}));
        for (const QuantizeStream& stream : s.streams) {
          CHECK(stream.backwards == (smooth && stream.num_tiles > 0 && stream.which == kK));
        }
        a.v_scale = HOPPER_ATTENTION_SCALE_HEAD;  // no maxima of channels
        CHECK(plan_quantize(a, &plan).ok());
        schedule_quantize({blocks, 1, 1}, &plan);
        const bool little = head_dim != 256 && all - early < blocks;
        CHECK((starts(s, kQ).at(1) == starts(s, kV).at(0)) == little);
        a.v_scale = HOPPER_ATTENTION_SCALE_TOKEN;
        CHECK(plan_quantize(a, &plan).ok());
        schedule_quantize({blocks, 1, 1}, &plan);
        CHECK(starts(s, kV) == std::vector<int>{early});
        CHECK(starts(s, kK) == std::vector<int>{early + all});
        CHECK(starts(s, kQ) == (std::vector<int>{0, early + 2 * all}));
      }
    }
  }
}

// Of what has a scale a head, two teams come back later than one.
void leads() {
  QuantizePlan plan;
  Call call;
  auto& a = call.args;
  a.heads = a.heads_kv = 32;
  a.seqlen_q = a.seqlen_k = 128 * 64;
  a.head_dim = a.head_dim_v = 64;
  a.qk_scale = HOPPER_ATTENTION_SCALE_HEAD;
  check::context = "leads";
  CHECK(plan_quantize(a, &plan).ok());
  for (int teams : {1, 2}) {
    schedule_quantize({100, teams, 3}, &plan);
    const std::vector<int> of_k = starts(plan.params.schedule, kK);
    const std::vector<int> of_v = starts(plan.params.schedule, kV);
    CHECK(of_k.at(1) - of_k.at(0) == 4 * 64 + (teams == 1 ? 200 : 300));
    CHECK(of_v.at(1) - of_v.at(0) == 4 * 64 + 200);
  }
}

// A tensor that shares a scale is measured while the one before it is quantized, from its end on;
// of what is measured, L2 keeps as much as it has room for. Streams take turns in both orders.
void whole_tensors() {
  QuantizePlan plan;
  Call call;
  auto& a = call.args;
  a.heads = a.heads_kv = 32;
  a.batch = 1;
  a.head_dim = a.head_dim_v = 128;
  a.seqlen_q = a.seqlen_k = 128 * 64;
  a.qk_scale = HOPPER_ATTENTION_SCALE_TENSOR;
  a.v_scale = HOPPER_ATTENTION_SCALE_TENSOR;
  check::context = "tensors that share a scale";
  CHECK(plan_quantize(a, &plan).ok());
  schedule_quantize({100, 1, 1}, &plan);
  const QuantizeSchedule& s = plan.params.schedule;
  const int all = 32 * 64, kept = kKeptBytes / (2 * 128 * 128);
  CHECK(s.num_streams == 6);
  for (int i = 0; i < s.num_streams; ++i) {
    const QuantizeStream& stream = s.streams[i];
    const bool measures = stream.pass == QuantizePass::kAmax;
    CHECK(stream.start == i / 2 * all + (measures ? 0 : all + 100));
    CHECK(stream.backwards == !measures && stream.kept_from == (measures ? all - kept : all));
  }
  // K is measured, V is quantized.
  std::int32_t segment = 0;
  const int first = all + 2 * 100 + 100;
  for (int ticket = first; ticket < first + 100; ticket += 4) {
    std::vector<int> streams;
    for (int i = 0; i < 4; ++i) streams.push_back(s(ticket + i, segment).stream);
    CHECK(streams[0] == streams[3] && streams[1] == streams[2] && streams[0] != streams[1]);
  }
}

void schedules() {
  std::mt19937 random(3);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  for (int round = 0; round < 300; ++round) {
    QuantizePlan plan;
    Call call;
    auto& a = call.args;
    a.batch = 1 + below(3);
    a.heads = below(7);
    a.heads_kv = below(5);
    a.seqlen_q = below(5) == 0 ? 0 : below(1500);
    a.seqlen_k = below(5) == 0 ? 0 : below(round % 10 == 0 ? 40000 : 1500);
    a.qk_scale = below(4);
    const int v_scales[] = {0, 1, 3, 4};
    a.v_scale = v_scales[below(4)];
    a.head_dim = a.head_dim_v = 8 << below(6);
    a.smooth_k = below(2);
    if (below(3) == 0)
      a.cu_seqlens_q = a.cu_seqlens_k = reinterpret_cast<std::int32_t*>(call.memory);
    check::context = "schedule of round " + std::to_string(round);
    CHECK(plan_quantize(a, &plan).ok());
    const QuantizeBlocks blocks{1 + below(below(3) == 0 ? 4 : 300), 1 + below(2), 1 + below(5)};
    schedule_quantize(blocks, &plan);
    tickets_are_sound(plan.params);
    early_tickets(plan.params, blocks);
    fair_turns(plan.params.schedule);
  }
}

// Tiles are each of (sequence, head, slot), a group's heads side by side.
void head_orders() {
  for (int heads : {1, 2, 3, 12, 16}) {
    for (int slots : {0, 1, 5, 128, 300, 600}) {
      for (int most : {1, 256, 512, INT_MAX}) {
        const HeadOrder order = head_order(2, heads, slots, most);
        const int tiles = std::max(slots, 1);
        check::context = "order of " + std::to_string(heads) + " heads, " + std::to_string(slots);
        CHECK(order.num_tiles == 2 * heads * tiles);
        const int group = order.by_group.divisor;
        CHECK(heads % group == 0 && group * tiles <= std::max(most, tiles));
        CHECK(most < INT_MAX || group == heads);
        std::vector<bool> seen(order.num_tiles);
        int sequence = 0;
        for (int i = 0; i < order.num_tiles; ++i) {
          const auto tile = order(i);
          CHECK(tile.sequence >= sequence && tile.sequence < 2);
          sequence = tile.sequence;
          CHECK(tile.head >= 0 && tile.head < heads && tile.slot >= 0 && tile.slot < tiles);
          const int at = (tile.sequence * heads + tile.head) * tiles + tile.slot;
          CHECK(!seen.at(at));
          seen.at(at) = true;
          if (i % group != 0) CHECK(order(i - 1).slot == tile.slot);
        }
      }
    }
  }
}

}  // namespace

int main() {
  head_orders();
  groups();
  beside_v();
  leads();
  whole_tensors();
  schedules();
  return check::result();
}
