// The ring of stages that a block of the quantizer loads its tiles into, as a model: tiles arrive
// in any order, and teams go as fast as they can.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "quantize/geometry.h"

namespace {

using namespace hopper_attention;

// A barrier in shared memory: waiting for a phase's parity passes where the phase that runs has the
// other one, so two phases cannot be told apart.
struct Barrier {
  int count, pending = count;
  int phase = 0;
  bool passes(int parity) const { return phase % 2 != parity % 2; }
  bool arrive() {  // false where nobody is awaited
    if (pending == 0) return false;
    if (--pending == 0) ++phase, pending = count;
    return true;
  }
};

// The n-th tile goes to stage n % stages and to team n % teams. Whether every team found its own
// tiles, and no barrier had an arrival too many.
bool plays_well(const QuantizeGeometry& of, bool waits_for_stage, unsigned seed) {
  constexpr int kTiles = 60;
  std::mt19937 random(seed);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  std::vector<Barrier> full(of.stages, Barrier{1}), empty(of.stages, Barrier{1});
  std::vector<int> tile_of(of.stages, -1), on_the_way;
  std::vector<int> next_of;
  for (int team = 0; team < of.teams; ++team) next_of.push_back(team);
  // Now and then a tile is late: it does not come while so many others do.
  std::vector<int> patience(kTiles);
  for (int& turns : patience) turns = below(8) == 0 ? 20 : 0;
  int loaded = 0;
  for (int step = 0; step < 1000 * kTiles; ++step) {
    if (*std::min_element(next_of.begin(), next_of.end()) >= kTiles) return true;
    if (below(3) == 0 && loaded < kTiles) {  // the loader
      if (empty[loaded % of.stages].passes(loaded / of.stages + 1)) on_the_way.push_back(loaded++);
    }
    if (below(3) == 0 && !on_the_way.empty()) {  // memory
      const int at = below(static_cast<int>(on_the_way.size())), tile = on_the_way[at];
      if (--patience[tile] < 0) {
        on_the_way.erase(on_the_way.begin() + at);
        tile_of[tile % of.stages] = tile;
        if (!full[tile % of.stages].arrive()) return false;
      }
    }
    int& n = next_of[below(of.teams)];  // a team; tasks are told before stages are free
    const int stage = n % of.stages, phase = n / of.stages;
    if (n >= kTiles || n >= loaded + of.teams) continue;
    if (waits_for_stage && !empty[stage].passes(phase + 1)) continue;
    if (!full[stage].passes(phase)) continue;
    if (tile_of[stage] != n || !empty[stage].arrive()) return false;
    n += of.teams;
  }
  return false;  // somebody waits forever
}

}  // namespace

int main() {
  for (int tile : {64, 128, 256}) {
    const QuantizeGeometry geometry = quantize_geometry(tile);
    check::context = "the ring of " + std::to_string(tile);
    for (unsigned seed = 0; seed < 2000; ++seed) {
      CHECK(plays_well(geometry, geometry.shares_stages(), seed));
    }
  }
  // Teams that share a stage and do not wait for it take each other's tiles.
  check::context = "two teams and five stages";
  int wrong = 0;
  for (unsigned seed = 0; seed < 2000; ++seed) wrong += !plays_well({32, 2, 5, 2}, false, seed);
  CHECK(wrong > 0);
  for (int stages : {3, 4, 5, 6, 7}) {
    for (int teams : {1, 2, 3}) {
      const QuantizeGeometry other{32, 2, stages, teams};
      check::context = std::to_string(teams) + " teams, " + std::to_string(stages) + " stages";
      for (unsigned seed = 0; seed < 300; ++seed) {
        CHECK(plays_well(other, other.shares_stages(), seed));
      }
    }
  }
  return check::result();
}
