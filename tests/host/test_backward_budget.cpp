// backward_budget.h: what every row's config takes of a block's shared memory, counted piece by
// piece.
#include "backward_instances.h"
#include "check.h"
#include "hopper_attention/backward_budget.h"

namespace {

using namespace hopper_attention;

// Tiles that a block knows of: up to head dimension 128 the next one, too, but with a soft cap.
int expected_slots(const BackwardConfig& config) {
  return config.roles == Roles::kAlike && config.key.mask != MaskKind::kCapped ? 2 : 1;
}

// Where a key block's sequence is read from a list: packed batches, and soft caps, whose kernels
// serve both kinds. And where a block takes one tile after another.
void tiles_that_one_warp_finds_pass_through_shared_memory() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    check::context = row.name;
    const BackwardConfig config = make_backward_config(row.key);
    const bool dense = row.key.mask == MaskKind::kFull || row.key.mask == MaskKind::kMasked;
    CHECK(is_ragged(config) == !dense);
    const bool needed = !dense || config.roles == Roles::kAlike;
    CHECK(tile_bytes(config) == (needed ? expected_slots(config) * 64 : 0));
  }
}

// Of V: a block that takes one tile after another has the next one's K beside its own.
int expected_value_buffers(const BackwardConfig& config) {
  return config.key.head_dim == 64 ? expected_slots(config) : 1;
}

// Where they have one, dV leaves through dS's buffers: a slab of columns in each.
void values_have_two_buffers_where_there_is_room() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    check::context = row.name;
    const BackwardConfig config = make_backward_config(row.key);
    CHECK(is_persistent(config) == (expected_slots(config) == 2));
    CHECK(value_buffers(config) == expected_value_buffers(config));
    if (!is_persistent(config) || value_buffers(config) == 2) continue;
    CHECK(shared_bytes(config, 2) > 232448);
    const int slab = slab_columns(config.key.head_dim_v, 2);
    CHECK(config.key.head_dim_v / slab <= config.ds_stages && slab <= config.tile_m);
  }
}

// The bytes of K, V, the stages of Q, dO, their statistics and dS, of dQ and P where they pass
// through shared memory, and of a cluster's other block, counted row by row.
int tensor_bytes(const BackwardConfig& config) {
  const int columns = expected_slots(config) * config.key.head_dim +
                      expected_value_buffers(config) * config.key.head_dim_v;
  int total = 0;
  for (int key = 0; key < config.tile_n; ++key) total += 2 * columns;
  for (int row = 0; row < config.tile_m; ++row) {
    total += config.stages * (2 * config.key.head_dim + 4);
    total += config.dout_stages * 2 * config.key.head_dim_v;
    total += 4 * (config.roles == Roles::kPaired ? config.stages : config.dout_stages);  // delta
    total += config.ds_stages * config.tile_n * 2;
    if (config.dq_path == DqPath::kBulk) total += config.key.head_dim * 4;
    if (config.roles == Roles::kPaired) total += config.tile_n * 4;
    if (config.roles == Roles::kThirds) total += config.ds_stages * config.tile_n * 2;
    if (config.roles == Roles::kPaired) total += config.ds_stages * config.tile_n * 2;
  }
  if (config.roles == Roles::kPaired) {  // the other block's keys, in the columns of this one's dQ
    for (int key = 0; key < config.tile_n; ++key) total += config.key.head_dim / 2 * 2;
  }
  return total;
}

void shared_memory_holds_every_tensor_and_barrier() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    check::context = row.name;
    const BackwardConfig config = make_backward_config(row.key);
    const int needed = tensor_bytes(config) + tile_bytes(config) + barrier_bytes(config);
    CHECK(shared_bytes(config) >= needed);
    CHECK(shared_bytes(config) <= needed + 2 * kNoBufferBytes + kSharedAlignment);
    CHECK(shared_bytes(config) <= 232448);  // a Hopper block's limit
  }
}

}  // namespace

int main() {
  tiles_that_one_warp_finds_pass_through_shared_memory();
  values_have_two_buffers_where_there_is_room();
  shared_memory_holds_every_tensor_and_barrier();
  return check::result();
}
