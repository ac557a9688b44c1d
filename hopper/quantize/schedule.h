// In which order the quantizer's blocks take the tiles of all passes over q, k and v: they draw
// tickets 0, 1, 2, ..., and a ticket names a tile of a pass. What a tile waits for always has
// earlier tickets, so that whoever draws one can count on it, however few blocks run at a time.
//
// A second pass over a tensor follows the first at a distance, few heads at a time, so that it
// finds in L2 what the first one read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hopper_attention/quantize.h"

namespace hopper_attention {

enum class QuantizePass : std::int32_t { kAmax, kQuantize };

// The order of a tensor's tiles: (heads / group, slot, head of the group), the last the fastest,
// batch before them all.
struct HeadOrder {
  std::int32_t num_tiles = 0;  // (batch or 1) * max(slots, 1) * heads
  FastDivide by_group_tiles;   // tiles of a group
  FastDivide by_group;         // heads of a group
  FastDivide by_groups;        // groups of a sequence

  struct Tile {
    std::int32_t sequence, head, slot;
  };

  HOPPER_ATTENTION_QUANTIZE_HD constexpr Tile operator()(std::int32_t index) const {
    const std::int32_t group = by_group_tiles.quotient(index);
    const std::int32_t in_group = index - group * by_group_tiles.divisor;
    const std::int32_t slot = by_group.quotient(in_group);
    const std::int32_t sequence = by_groups.quotient(group);
    const std::int32_t head = (group - sequence * by_groups.divisor) * by_group.divisor + in_group -
                              slot * by_group.divisor;
    return {sequence, head, slot};
  }
};

// A group's elements, where a tensor has so many: the group itself, what comes ahead of it and what
// the passes write meanwhile are in L2 when the second pass takes it. L2 has 50 MB, but what one of
// its halves fetches for the other is in both.
inline constexpr int kGroupBytes = 4 << 20;

// Of a tensor that shares a scale, what L2 still has when its second pass begins with it.
inline constexpr int kKeptBytes = 24 << 20;

// While the workspace is being cleared, or a smoothed K's mean made: so many tiles of Q a team.
inline constexpr int kEarlyDraws = 4, kEarlyDrawsOfMean = 8;

// group_tiles: of as many heads as side by side have at most so many tiles, but one at least.
inline HeadOrder head_order(std::int64_t sequences, int heads, int slots, int group_tiles) {
  HeadOrder order;
  slots = std::max(slots, 1);
  order.num_tiles = static_cast<std::int32_t>(sequences * slots * heads);  // 0 without heads
  heads = std::max(heads, 1);
  int group = std::clamp(group_tiles / slots, 1, heads);
  while (heads % group != 0) --group;
  order.by_group = FastDivide(group);
  order.by_group_tiles = FastDivide(group * slots);
  order.by_groups = FastDivide(heads / group);
  return order;
}

// A pass over a tensor, or over some of its tiles, takes one tile a unit of time from its start.
struct QuantizeStream {
  std::int32_t which;  // QuantizeWhich
  QuantizePass pass;
  std::int32_t start;
  std::int32_t first_tile;
  std::int32_t num_tiles;
  bool backwards;
  std::int32_t kept_from;  // the tiles from here on stay in L2 for the next pass
};

// A time during which the same streams run: they take turns.
struct ScheduleSegment {
  std::int32_t first_ticket;
  std::int32_t first_time;
  FastDivide by_streams;
  std::int8_t streams[8];
};

struct QuantizeSchedule {
  static constexpr int kMaxStreams = 6;
  std::int32_t num_tickets = 0;
  std::int32_t num_streams = 0;
  std::int32_t num_segments = 0;
  QuantizeStream streams[kMaxStreams];
  ScheduleSegment segments[2 * kMaxStreams];

  struct Drawn {
    std::int32_t stream;
    std::int32_t tile;  // of the tensor's HeadOrder
    bool kept;          // a later pass finds it in L2
  };

  // segment: where the last ticket was, 0 at first; tickets rise.
  HOPPER_ATTENTION_QUANTIZE_HD constexpr Drawn operator()(std::int32_t ticket,
                                                          std::int32_t& segment) const {
    while (segment + 1 < num_segments && ticket >= segments[segment + 1].first_ticket) ++segment;
    const ScheduleSegment& s = segments[segment];
    const std::int32_t at = ticket - s.first_ticket;
    const std::int32_t step = s.by_streams.quotient(at);
    // A team that gets every other ticket has its share of all streams, of which some are less
    // work. Where they are an even number, every other time the first is the last.
    std::int32_t turn = at - step * s.by_streams.divisor;
    if ((step & 1 & ~s.by_streams.divisor) != 0) {
      turn = turn + 1 == s.by_streams.divisor ? 0 : turn + 1;
    }
    const std::int32_t index = s.streams[turn];
    const QuantizeStream& stream = streams[index];
    const std::int32_t tile = s.first_time + step - stream.start;
    return {index, stream.first_tile + (stream.backwards ? stream.num_tiles - 1 - tile : tile),
            tile >= stream.kept_from};
  }

  // Both passes over one tensor, from `time` on; returns when the next tensor may begin. A tile of
  // a pass waits for all of its heads' in the one before, or for all of the tensor's where they
  // share a scale: that pass goes backwards, since L2 has the end of a tensor. ahead: how many
  // tiles sooner than they must the first ones come, so that nobody has to wait for them.
  std::int32_t add_both(int which, const HeadOrder& order, bool whole, int kept_tiles, int ahead,
                        std::int32_t time) {
    const std::int32_t n = order.num_tiles;
    if (n == 0) return time;
    const std::int64_t group = std::int64_t{order.by_group_tiles.divisor} + ahead;
    const auto lead = static_cast<std::int32_t>(std::min<std::int64_t>(n, group));
    const std::int32_t kept_from = whole ? std::max(0, n - kept_tiles) : 0;
    streams[num_streams++] = {which, QuantizePass::kAmax, time, 0, n, false, kept_from};
    add_last(which, 0, n, whole, time + (whole ? n + ahead : lead));
    return time + n;
  }

  // The last pass, or the only one, over some tiles.
  std::int32_t add_last(int which, std::int32_t first, std::int32_t count, bool backwards,
                        std::int32_t time) {
    if (count == 0) return time;
    streams[num_streams++] = {which, QuantizePass::kQuantize, time, first, count, backwards, count};
    return time + count;
  }

  // Segments from streams, when all are there.
  void finish() {
    std::vector<std::int32_t> events;
    for (int i = 0; i < num_streams; ++i) {
      events.push_back(streams[i].start);
      events.push_back(streams[i].start + streams[i].num_tiles);
    }
    std::sort(events.begin(), events.end());
    for (std::size_t e = 0; e + 1 < events.size(); ++e) {
      const std::int32_t begin = events[e], end = events[e + 1];
      ScheduleSegment segment{num_tickets, begin, {}, {}};
      int running = 0;
      for (int i = 0; i < num_streams; ++i) {
        const bool runs =
            streams[i].start <= begin && end <= streams[i].start + streams[i].num_tiles;
        if (begin < end && runs) segment.streams[running++] = static_cast<std::int8_t>(i);
      }
      if (running == 0) continue;
      segment.by_streams = FastDivide(running);
      segments[num_segments++] = segment;
      num_tickets += running * (end - begin);
    }
  }
};

}  // namespace hopper_attention
