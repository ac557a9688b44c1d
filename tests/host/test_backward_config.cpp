// Every row of the backward pass's instances.def can be built, every request finds one row, and
// dQ's accumulator has a place for each element.
#include <set>
#include <string>
#include <vector>

#include "backward_instances.h"
#include "check.h"
#include "hopper_attention/backward_budget.h"
#include "hopper_attention/dq_layout.h"

namespace {

using namespace hopper_attention;

constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBfloat16};

// "bf16_d192x128_masked" from a key: the name that a row must have.
std::string expected_name(const BackwardKey& key) {
  std::string name = key.dtype == Dtype::kBfloat16 ? "bf16_d" : "fp16_d";
  name += std::to_string(key.head_dim);
  if (key.head_dim_v != key.head_dim) name += "x" + std::to_string(key.head_dim_v);
  return name + "_" + name_of(key.mask);
}

void each_row_is_named_after_its_key_and_fits() {
  std::set<std::string> names;
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    check::context = row.name;
    CHECK(names.insert(row.name).second);
    CHECK(row.name == expected_name(row.key));
    const BackwardConfig config = make_backward_config(row.key);
    CHECK(config.key == row.key);
    const char* error = config_error(config);
    if (error != nullptr) check::context += std::string(": ") + error;
    CHECK(error == nullptr);
    CHECK(config.reason != nullptr && config.reason[0] != '\0');
    CHECK(row.key.head_dim % key_slab_columns(config) == 0);
  }
}

// What the forward pass can run, the backward pass can differentiate.
void there_is_one_row_for_each_head_dim_dtype_and_mask() {
  for (const HeadDims& dims : kForwardHeadDims) {
    for (Dtype dtype : kDtypes) {
      for (MaskKind mask :
           {MaskKind::kFull, MaskKind::kMasked, MaskKind::kPacked, MaskKind::kCapped}) {
        const BackwardKey key{dtype, dims.qk, dims.v, mask};
        check::context = expected_name(key);
        int found = 0;
        for (const BackwardInstanceRow& row : kBackwardInstanceRows) found += row.key == key;
        CHECK(found == 1);
      }
    }
  }
}

using Change = void (*)(BackwardConfig&);

// The error of the changed config begins with these words.
void refuses_with(const std::string& words, const BackwardConfig& config, Change change) {
  BackwardConfig changed = config;
  change(changed);
  const char* error = config_error(changed);
  check::context = error ? error : "no error";
  CHECK(error != nullptr && std::string(error).find(words) == 0);
}

// A step's dQ is computed while the next step's dS is written: with one stage each would wait for
// the other.
void late_dq_is_refused_where_it_cannot_run() {
  const Change changes[] = {
      [](BackwardConfig& c) { c.stages = c.ds_stages = 1; },
      [](BackwardConfig& c) { c.ds_stages = 2; },
      [](BackwardConfig& c) { c.ahead_scores = false; },
      [](BackwardConfig& c) { c.dq_slices = 3; },
  };
  const BackwardKey key{Dtype::kBfloat16, 96, 96, MaskKind::kMasked};
  const BackwardConfig config = make_backward_config(key);
  check::context = "d96";
  CHECK(config.late_dq && config.k_in_registers && config_error(config) == nullptr);
  for (const Change change : changes) refuses_with("dQ late", config, change);
}

BackwardConfig with_stages(BackwardConfig config, int stages, bool ds_waits) {
  config.stages = config.dout_stages = config.ds_stages = stages;
  config.ds_waits = ds_waits;
  return config;
}

// With late dQ a step's dS is read until the step after it has been written.
void buffers_of_ds_are_waited_for_where_they_are_few() {
  const BackwardConfig d128 = make_backward_config({Dtype::kBfloat16, 128, 128, MaskKind::kFull});
  const BackwardConfig d96 = make_backward_config({Dtype::kBfloat16, 96, 96, MaskKind::kFull});
  const auto refuses = [](const BackwardConfig& config) {
    refuses_with("dS ", config, [](BackwardConfig&) {});
  };
  check::context = "enough buffers";
  CHECK(config_error(with_stages(d128, 2, false)) == nullptr);
  CHECK(config_error(with_stages(d128, 1, true)) == nullptr);
  CHECK(config_error(with_stages(d96, 3, false)) == nullptr);
  CHECK(config_error(with_stages(d96, 2, true)) == nullptr);
  refuses(with_stages(d128, 1, false));
  refuses(with_stages(d96, 2, false));
  for (const int head_dim : {192, 256}) {
    BackwardConfig config =
        make_backward_config({Dtype::kBfloat16, head_dim, head_dim, MaskKind::kFull});
    config.ds_waits = true;
    refuses(config);
  }
}

// K, dK and dV, S, dP and dQ at the same time.
void late_dq_counts_every_fragment() {
  const BackwardKey key{Dtype::kBfloat16, 96, 96, MaskKind::kMasked};
  BackwardConfig config = make_backward_config(key);
  CHECK(fragment_registers(config) == 24 + 48 + 48 + 32 + 32 + 24);
  config.k_in_registers = false;
  CHECK(fragment_registers(config) == 48 + 48 + 32 + 32 + 24);
}

// What the consumers do not wait for rests on the number of buffers.
void thirds_are_refused_where_they_cannot_run() {
  const Change changes[] = {
      [](BackwardConfig& c) { c.tile_n = 80; },
      [](BackwardConfig& c) { c.tile_n = 64; },
      [](BackwardConfig& c) { c.num_consumers = 2; },
      [](BackwardConfig& c) { c.dq_split = DqSplit::kRows; },
      [](BackwardConfig& c) { c.dq_slices = 2; },
      [](BackwardConfig& c) { c.dq_path = DqPath::kDirect; },
      [](BackwardConfig& c) { c.key.head_dim = 256; },
      [](BackwardConfig& c) { c.key.head_dim_v = 96; },
      [](BackwardConfig& c) { c.key.head_dim_v = 64; },
      [](BackwardConfig& c) { c.stages = 1; },
      [](BackwardConfig& c) { c.dout_stages = 2; },
      [](BackwardConfig& c) { c.ds_stages = 2; },
      [](BackwardConfig& c) { c.ahead_scores = true; },
  };
  const BackwardKey key{Dtype::kBfloat16, 192, 192, MaskKind::kMasked};
  const BackwardConfig config = make_backward_config(key);
  check::context = "d192";
  CHECK(in_thirds(config) && config_error(config) == nullptr);
  for (const Change change : changes) refuses_with("thirds", config, change);
  BackwardConfig wide = config;
  wide.tile_n = 160;  // dK and dV of 80 registers each
  check::context = "160 keys";
  CHECK(config_error(wide) != nullptr);
}

// 64 columns of dK^T and dV^T; S and dP of half of the keys, or a third of dQ in their place.
void thirds_count_every_fragment() {
  const BackwardKey key{Dtype::kBfloat16, 192, 192, MaskKind::kMasked};
  BackwardConfig config = make_backward_config(key);
  CHECK(fragment_registers(config) == 48 + 48 + 24 + 24);
  config.tile_n = 32;
  CHECK(fragment_registers(config) == 16 + 16 + 32);
}

// Each column of dK and dV is one consumer's, in thirds 64 each.
void gradients_have_parts() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    const BackwardConfig config = make_backward_config(row.key);
    check::context = row.name;
    for (const int columns : {row.key.head_dim, row.key.head_dim_v}) {
      const int parts = gradient_parts(config, columns);
      CHECK(parts <= config.num_consumers && columns % parts == 0);
      if (in_thirds(config)) CHECK(columns / parts == 64);
    }
  }
}

// Each of a cluster's blocks adds one slice of dQ; the second consumer's products are a step late,
// so that Q and dS of two steps are there at the same time, and dO of one.
void clusters_are_refused_where_they_cannot_run() {
  const Change changes[] = {
      [](BackwardConfig& c) { c.tile_n = 128; },
      [](BackwardConfig& c) { c.num_consumers = 3; },
      [](BackwardConfig& c) { c.dq_split = DqSplit::kRows; },
      [](BackwardConfig& c) { c.dq_path = DqPath::kBulk; },
      [](BackwardConfig& c) { c.dq_slices = 4; },
      [](BackwardConfig& c) { c.dq_slices = 1; },
      [](BackwardConfig& c) { c.stages = c.ds_stages = 1; },
      [](BackwardConfig& c) { c.ds_stages = 1; },
      [](BackwardConfig& c) { c.dout_stages = 3; },
  };
  const BackwardKey key{Dtype::kBfloat16, 256, 256, MaskKind::kMasked};
  const BackwardConfig config = make_backward_config(key);
  check::context = "d256";
  CHECK(cluster_blocks(config) == 2 && config.dout_stages == 1 && config_error(config) == nullptr);
  for (const Change change : changes) refuses_with("a cluster", config, change);
}

// What one TMA store of dK or dV takes: a consumer's keys, or where they are shared all.
void gradients_leave_in_boxes_of_their_rows() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    check::context = row.name;
    const BackwardConfig config = make_backward_config(row.key);
    const int stores = config.roles == Roles::kAlike ? config.num_consumers : 1;
    CHECK(stores * gradient_rows(config) == config.tile_n);
  }
}

// Column of dQ that a consumer's own column is, in the share of the product that the split gives
// it.
int column_of(const DqLayout& layout, int consumer, int own) {
  if (layout.split != DqSplit::kColumns) return own;
  const int piece = layout.head_dim / (layout.num_consumers * layout.slices);
  const int slice = own / piece;
  return slice * piece * layout.num_consumers + consumer * piece + own % piece;
}

// Where element i of a thread's accumulator belongs: WGMMA gives each warp 16 rows, a thread two of
// them, and of every 8 columns two neighbours.
DqPosition position_of(const DqLayout& layout, int consumer, int thread, int i) {
  const int row = thread / 32 * 16 + i / 2 % 2 * 8 + thread % 32 / 4;
  const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
  if (layout.split == DqSplit::kRows) return {consumer * 64 + row, column};
  return {row, column_of(layout, consumer, column)};
}

// A consumer's accumulators lie one after the other, 16 bytes a thread at a time.
void accumulator_places_are_those_of_the_threads(const DqLayout& layout) {
  std::vector<int> seen(layout.elements(), 0);
  const int consumer_elements = layout.elements() / layout.num_consumers;
  CHECK(consumer_elements * layout.num_consumers == layout.elements());
  for (int consumer = 0; consumer < layout.num_consumers; ++consumer) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < consumer_elements / 128; ++i) {
        const int place = consumer * consumer_elements + (i / 4 * 128 + thread) * 4 + i % 4;
        DqPosition found = layout(place / 4);
        found.row += i / 2 % 2 * 8;
        found.column += i % 2;
        const DqPosition expected = position_of(layout, consumer, thread, i);
        CHECK(found.row == expected.row && found.column == expected.column);
        CHECK(found.row >= 0 && found.row < layout.tile_m);
        CHECK(found.column >= 0 && found.column < layout.head_dim);
        ++seen[found.row * layout.head_dim + found.column];
      }
    }
  }
  for (int count : seen) CHECK(count == 1);
}

void every_element_of_dq_has_one_place() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    if (row.key.dtype != Dtype::kBfloat16) continue;
    check::context = row.name;
    const BackwardConfig config = make_backward_config(row.key);
    const DqLayout layout = make_dq_layout(config);
    const DqLayout own{config.dq_split, config.tile_m, config.key.head_dim, config.num_consumers,
                       config.dq_slices};
    accumulator_places_are_those_of_the_threads(own);
    CHECK(layout.elements() == own.elements());
    for (int group = 0; group < own.elements() / 4; ++group) {
      const DqPosition found = layout(group), expected = own(group);
      CHECK(found.row == expected.row && found.column == expected.column);
    }
  }
  const DqLayout others[] = {{DqSplit::kRows, 128, 96, 2, 1},
                             {DqSplit::kRows, 192, 64, 3, 1},
                             {DqSplit::kColumns, 64, 96, 3, 1},
                             {DqSplit::kColumns, 64, 256, 2, 4}};
  for (const DqLayout& layout : others) {
    check::context = "split " + std::to_string(static_cast<int>(layout.split)) + ", " +
                     std::to_string(layout.tile_m) + " x " + std::to_string(layout.head_dim);
    accumulator_places_are_those_of_the_threads(layout);
  }
}

template <class Change>
void refuses(const char* text, Change change) {
  // clang-format off
  BackwardConfig config{{Dtype::kBfloat16, 128, 128, MaskKind::kMasked}, 64, 128, 2, 2, 2, 2,
                        Roles::kAlike, DqSplit::kColumns, 1, DqPath::kDirect, false, false, false,
                        "an example"};
  // clang-format on
  check::context = "unchanged";
  CHECK(config_error(config) == nullptr);
  change(config);
  const char* error = config_error(config);
  check::context = std::string(text) + " in: " + (error ? error : "no error");
  CHECK(error != nullptr && std::string(error).find(text) != std::string::npos);
}

void what_cannot_be_built_is_refused() {
  refuses("consumers", [](BackwardConfig& c) { c.num_consumers = 4; });
  refuses("tile_m", [](BackwardConfig& c) { c.tile_m = 72; });
  refuses("tile_n", [](BackwardConfig& c) { c.tile_n = 64; });
  refuses("stages", [](BackwardConfig& c) { c.stages = 0; });
  refuses("stages", [](BackwardConfig& c) { c.dout_stages = 0; });
  refuses("stages of dO", [](BackwardConfig& c) { c.dout_stages = 1; });
  refuses("shared memory", [](BackwardConfig& c) { c.stages = c.dout_stages = 6; });
  refuses("cluster: blocks of 2", [](BackwardConfig& c) { c.roles = Roles::kPaired; });
  refuses("K in registers", [](BackwardConfig& c) { c.k_in_registers = true; });
  refuses("dQ late: consumers alike", [](BackwardConfig& c) { c.late_dq = true; });
  refuses("registers", [](BackwardConfig& c) { c.late_dq = c.ahead_scores = true; });
  refuses("registers", [](BackwardConfig& c) {
    c.tile_m = 128;
    c.dq_split = DqSplit::kRows;
    c.dq_slices = c.stages = c.ds_stages = 1;
  });
}

}  // namespace

int main() {
  each_row_is_named_after_its_key_and_fits();
  there_is_one_row_for_each_head_dim_dtype_and_mask();
  every_element_of_dq_has_one_place();
  what_cannot_be_built_is_refused();
  late_dq_is_refused_where_it_cannot_run();
  buffers_of_ds_are_waited_for_where_they_are_few();
  late_dq_counts_every_fragment();
  thirds_are_refused_where_they_cannot_run();
  thirds_count_every_fragment();
  gradients_have_parts();
  clusters_are_refused_where_they_cannot_run();
  gradients_leave_in_boxes_of_their_rows();
  return check::result();
}
