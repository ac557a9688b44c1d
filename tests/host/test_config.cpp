// Every row of instances.def can be built, and every request finds one row.
#include <set>
#include <string>

#include "check.h"
#include "hopper_attention/budget.h"
#include "instances.h"

namespace {

using namespace hopper_attention;

constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBfloat16, Dtype::kE4M3, Dtype::kE4M3Fast};

// "bf16_d192x128_masked" from a key: the name that a row must have.
std::string expected_name(const ForwardKey& key) {
  constexpr const char* kPrefixes[] = {"fp16_d", "bf16_d", "e4m3_d", "e4m3fast_d"};
  std::string name = kPrefixes[static_cast<int>(key.dtype)];
  name += std::to_string(key.head_dim);
  if (key.head_dim_v != key.head_dim) name += "x" + std::to_string(key.head_dim_v);
  return name + "_" + name_of(key.mask);
}

void each_row_is_named_after_its_key_and_fits() {
  std::set<std::string> names;
  for (const InstanceRow& row : kInstanceRows) {
    check::context = row.name;
    CHECK(names.insert(row.name).second);
    CHECK(row.name == expected_name(row.key));

    const ForwardConfig config = make_forward_config(row.key);
    CHECK(config.key == row.key);
    const char* error = config_error(config);
    if (error != nullptr) check::context += std::string(": ") + error;
    CHECK(error == nullptr);
    CHECK(config.reason != nullptr && config.reason[0] != '\0');
    const int bytes = element_bytes(row.key.dtype);
    CHECK(row.key.head_dim % slab_columns(row.key.head_dim, bytes) == 0);
    CHECK(row.key.head_dim_v % slab_columns(row.key.head_dim_v, kOutputBytes) == 0);
  }
}

void there_is_one_row_for_each_head_dim_dtype_and_mask() {
  for (const HeadDims& dims : kForwardHeadDims) {
    for (Dtype dtype : kDtypes) {
      for (MaskKind mask :
           {MaskKind::kFull, MaskKind::kMasked, MaskKind::kPacked, MaskKind::kShort}) {
        const ForwardKey key{dtype, dims.qk, dims.v, mask};
        check::context = expected_name(key);
        int found = 0;
        for (const InstanceRow& row : kInstanceRows) found += row.key == key;
        // Fast accumulation has masked rows alone, and serves full requests with them.
        const bool fast_full = dtype == Dtype::kE4M3Fast && mask == MaskKind::kFull;
        const bool fp8_packed = is_fp8(dtype) && mask == MaskKind::kPacked;
        const bool not_short = mask == MaskKind::kShort && (is_fp8(dtype) || dims.qk != 64);
        const bool none = fast_full || fp8_packed || not_short;
        CHECK(found == (has_head_dims(dtype, dims) && !none ? 1 : 0));
      }
    }
  }
}

void registers_stay_within_the_file_before_and_after_the_split() {
  for (int consumers = 2; consumers <= 3; ++consumers) {
    check::context = std::to_string(consumers) + " consumers";
    const RegisterSplit split = register_split(consumers);
    CHECK(split.launch * (consumers + 1) * kWarpgroupThreads <= kRegisterFile);
    CHECK((split.producer + consumers * split.consumer) * kWarpgroupThreads <= kRegisterFile);
    for (int count : {split.producer, split.consumer}) {
      CHECK(count % 8 == 0 && count >= 24 && count <= 256);  // setmaxnreg's limits
    }
    CHECK(split.producer <= split.launch && split.launch <= split.consumer);
  }
}

// The bytes of Q, the K and V stages, V to transpose, row sums and O, counted element by element.
int tensor_bytes(const ForwardConfig& config) {
  const int bytes = element_bytes(config.key.dtype);
  int total = 0;
  for (int row = 0; row < config.num_consumers * 64; ++row) {
    total += config.key.head_dim * bytes * (config.ahead_first ? 2 : 1);
    if (!o_overlays(config)) total += config.key.head_dim_v * 2;
  }
  const bool ones = config.key.dtype == Dtype::kE4M3;
  const bool masked_fp8 = is_fp8(config.key.dtype) && config.key.mask == MaskKind::kMasked;
  for (int key = 0; key < config.tile_n; ++key) {
    total += config.stages * bytes * (config.key.head_dim + config.key.head_dim_v + (ones ? 8 : 0));
    if (masked_fp8) total += 2 * config.key.head_dim_v;
  }
  if (ones && masked_fp8) total += config.num_consumers * 64 * 4;  // a float a row
  return total;
}

void shared_memory_holds_every_tensor_and_barrier() {
  for (const InstanceRow& row : kInstanceRows) {
    check::context = row.name;
    const ForwardConfig config = make_forward_config(row.key);
    CHECK(shared_bytes(config) >= tensor_bytes(config) + barrier_bytes(config));
    CHECK(shared_bytes(config) < tensor_bytes(config) + barrier_bytes(config) + kSharedAlignment);
    CHECK(shared_bytes(config) <= 232448);  // a Hopper block's limit
    // O may overlay Q only where it fits there, in whole rounds.
    CHECK(o_bytes(config) <= o_rounds(config) * q_bytes(config) || !o_overlays_q(config));
    CHECK(config.key.head_dim_v % o_rounds(config) == 0);
    CHECK(is_fp8(config.key.dtype) || o_rounds(config) == 1);
    // In 16 bits it overlays V, where every consumer's O must fit at once.
    CHECK(o_overlays(config) == (o_overlays_q(config) || o_overlays_v(config)));
    const int values = config.stages * config.tile_n * config.key.head_dim_v * 2;
    CHECK(!o_overlays_v(config) || config.num_consumers * 64 * config.key.head_dim_v * 2 <= values);
  }
}

// Tuning offers every field to every row; what a kernel does not heed must be refused.
void choices_of_the_16_bit_kernel_are_refused_in_fp8() {
  for (const InstanceRow& row : kInstanceRows) {
    check::context = row.name;
    for (bool ForwardConfig::* choice : {&ForwardConfig::late_rescale, &ForwardConfig::mask_by_bits,
                                         &ForwardConfig::alpha_first, &ForwardConfig::free_first}) {
      ForwardConfig config = make_forward_config(row.key);
      config.*choice = true;
      CHECK((config_error(config) == nullptr) == !is_fp8(row.key.dtype));
    }
  }
}

// A full and an empty barrier a buffer, and in a cluster one more for K's and V's.
void barriers_are_counted_one_by_one() {
  for (const InstanceRow& row : kInstanceRows) {
    check::context = row.name;
    ForwardConfig config = make_forward_config(row.key);
    config.cluster = 1;
    const int alone = barrier_bytes(config);
    config.cluster = 2;
    int more = 0;
    for (int stage = 0; stage < config.stages; ++stage) more += 8 + 8;
    CHECK(barrier_bytes(config) == alone + more && more % 16 == 0);
  }
}

void clusters_are_refused_where_nothing_is_shared() {
  for (const InstanceRow& row : kInstanceRows) {
    check::context = row.name;
    ForwardConfig config = make_forward_config(row.key);
    CHECK(config_error(config) == nullptr);
    for (int cluster : {-1, 0, 3, 4}) {
      config.cluster = cluster;
      CHECK(config_error(config) == std::string("cluster: 1 or 2 blocks"));
    }
    config.cluster = 2;
    const bool may = !is_fp8(row.key.dtype) && row.key.mask == MaskKind::kFull;
    CHECK((config_error(config) == nullptr) == may);
  }
}

// A narrow first block is one of the blocks of a mask's kernel, and narrower than they are.
void narrow_first_blocks_are_refused_where_they_have_no_use() {
  for (const InstanceRow& row : kInstanceRows) {
    check::context = row.name;
    ForwardConfig config = make_forward_config(row.key);
    config.narrow_first = true;
    config.ahead_first = false;  // of which one can be had
    const bool masked = !is_fp8(row.key.dtype) && row.key.mask != MaskKind::kFull;
    CHECK((config_error(config) == nullptr) == (masked && config.tile_n > 64));
  }
}

// A second buffer of Q, with a full and an empty barrier a consumer, in packed batches two more
// slots for tiles; and nothing that the kernel's path for it does not know: skipped blocks, narrow
// ones, turns at the first block.
void first_products_go_ahead_where_the_kernel_can_do_it() {
  for (const InstanceRow& row : kInstanceRows) {
    check::context = row.name;
    ForwardConfig config = make_forward_config(row.key);
    config.ahead_first = false;
    const int q = q_bytes(config), barriers = barrier_bytes(config);
    config.ahead_first = true;
    CHECK(q_bytes(config) == 2 * q);
    const int slots = row.key.mask == MaskKind::kPacked ? 2 * (16 + 32) : 0;  // two more tiles'
    CHECK(barrier_bytes(config) == barriers + 16 * config.num_consumers + slots);
    const bool d128 = row.key.head_dim == 128 && row.key.mask != MaskKind::kFull;
    const bool may = d128 && !is_fp8(row.key.dtype);
    CHECK((config_error(config) == nullptr) == may);
    if (!may) continue;
    CHECK(make_forward_config(row.key).ahead_first);
    for (int tile_n : {96, 112, 128, 144}) {
      ForwardConfig other = config;
      other.tile_n = tile_n;
      CHECK((config_error(other) == nullptr) == (tile_n >= 128));
    }
    for (bool turns : {false, true}) {
      ForwardConfig other = config;
      other.ping_pong = turns;
      other.free_first = false;
      CHECK((config_error(other) == nullptr) == !turns);
    }
    config.narrow_first = true;
    CHECK(config_error(config) != nullptr);
  }
}

// The pair with the fewest columns among those that hold the request.
HeadDims smallest_by_search(Dtype dtype, int head_dim, int head_dim_v) {
  HeadDims best{0, 0};
  for (const HeadDims& dims : kForwardHeadDims) {
    if (is_fp8(dtype) && dims.qk != dims.v) continue;
    const bool holds = dims.qk >= head_dim && dims.v >= head_dim_v;
    if (holds && (best.qk == 0 || dims.qk + dims.v < best.qk + best.v)) best = dims;
  }
  return best;
}

void a_request_runs_in_the_smallest_head_dims_that_hold_it() {
  for (Dtype dtype : kDtypes) {
    for (int head_dim = 8; head_dim <= 264; head_dim += 8) {
      for (int head_dim_v = 8; head_dim_v <= 264; head_dim_v += 8) {
        check::context = std::to_string(head_dim) + ", " + std::to_string(head_dim_v);
        const HeadDims dims = tile_head_dims(dtype, head_dim, head_dim_v);
        const HeadDims expected = smallest_by_search(dtype, head_dim, head_dim_v);
        CHECK(dims.qk == expected.qk && dims.v == expected.v);
      }
    }
  }
}

}  // namespace

int main() {
  each_row_is_named_after_its_key_and_fits();
  there_is_one_row_for_each_head_dim_dtype_and_mask();
  registers_stay_within_the_file_before_and_after_the_split();
  shared_memory_holds_every_tensor_and_barrier();
  choices_of_the_16_bit_kernel_are_refused_in_fp8();
  barriers_are_counted_one_by_one();
  clusters_are_refused_where_nothing_is_shared();
  narrow_first_blocks_are_refused_where_they_have_no_use();
  first_products_go_ahead_where_the_kernel_can_do_it();
  a_request_runs_in_the_smallest_head_dims_that_hold_it();
  return check::result();
}
