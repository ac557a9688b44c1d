// Writes tiles.json: what config.h chooses for every row of hopper/forward/instances.def. The
// emulation reads its tile sizes there, so that it and the kernels cannot disagree. Likewise, where
// a second name is given, backward_tiles.json from backward_config.h.
#include <cstdio>

#include "hopper_attention/backward_budget.h"
#include "hopper_attention/budget.h"
#include "hopper_attention/fp8.h"
#include "hopper_attention/mask.h"

namespace {

using namespace hopper_attention;

struct Instance {
  const char* name;
  ForwardKey key;
};

constexpr Instance kInstances[] = {
#define HOPPER_ATTENTION_FORWARD(name, dtype, head_dim, head_dim_v, mask) \
  {#name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}},
#include "forward/instances.def"
#undef HOPPER_ATTENTION_FORWARD
};

struct BackwardInstance {
  const char* name;
  BackwardKey key;
};

constexpr BackwardInstance kBackwardInstances[] = {
#define HOPPER_ATTENTION_BACKWARD(name, dtype, head_dim, head_dim_v, mask) \
  {"backward_" #name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}},
#include "backward/instances.def"
#undef HOPPER_ATTENTION_BACKWARD
};

// The fewest keys of a request that a row serves; one with fewer runs in the masked row.
int min_keys(const ForwardKey& key) {
  const bool short_too = tile_mask(key.dtype, key.head_dim, true, 0, 0) == MaskKind::kFull;
  return key.mask != MaskKind::kFull || short_too ? 0 : kShortKeys + 1;
}

// The most keys that a row of such a request sees; one with more runs in the masked row.
int max_row_keys(const ForwardKey& key) {
  return key.mask == MaskKind::kShort ? kFewKeys : kMaxLength;
}

void write_row(std::FILE* file, const Instance& instance, bool last) {
  const ForwardConfig config = make_forward_config(instance.key);
  std::fprintf(file,
               "  {\"name\": \"%s\", \"dtype\": \"%s\", \"head_dim\": %d, \"head_dim_v\": %d, "
               "\"mask\": \"%s\", \"tile_m\": %d, \"tile_n\": %d, \"stages\": %d, "
               "\"num_consumers\": %d, \"min_keys\": %d, \"max_row_keys\": %d, \"v_parts\": %d, "
               "\"sums_by_ones\": %s, \"slack\": %g, \"offset\": %d}%s\n",
               instance.name, name_of(instance.key.dtype), instance.key.head_dim,
               instance.key.head_dim_v, name_of(instance.key.mask), config.tile_m(), config.tile_n,
               config.stages, config.num_consumers, min_keys(instance.key),
               max_row_keys(instance.key), config.v_parts, sums_by_ones(config) ? "true" : "false",
               sums_by_ones(config) ? double{kMaximumSlack} : 0.0,
               is_fp8(instance.key.dtype) ? kOffsetLog2 : 0, last ? "" : ",");
}

void write_row(std::FILE* file, const BackwardInstance& instance, bool last) {
  const BackwardConfig config = make_backward_config(instance.key);
  std::fprintf(file,
               "  {\"name\": \"%s\", \"dtype\": \"%s\", \"head_dim\": %d, \"head_dim_v\": %d, "
               "\"mask\": \"%s\", \"tile_m\": %d, \"tile_n\": %d, \"stages\": %d, "
               "\"num_consumers\": %d, \"cluster\": %d, \"smem_bytes\": %d, "
               "\"reason\": \"%s\"}%s\n",
               instance.name, name_of(instance.key.dtype), instance.key.head_dim,
               instance.key.head_dim_v, name_of(instance.key.mask), config.tile_m, config.tile_n,
               config.stages, config.num_consumers, cluster_blocks(config), shared_bytes(config),
               config.reason, last ? "" : ",");
}

template <class Row, std::size_t size>
bool write_table(const char* path, const Row (&rows)[size]) {
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) {
    std::fprintf(stderr, "write_tiles: cannot open %s for writing\n", path);
    return false;
  }
  std::fputs("[\n", file);
  for (const Row& row : rows) write_row(file, row, &row == &rows[size - 1]);
  std::fputs("]\n", file);
  if (std::fclose(file) == 0) return true;
  std::fprintf(stderr, "write_tiles: cannot write %s\n", path);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 3) {
    std::fprintf(stderr, "usage: write_tiles FILE [BACKWARD_FILE]\n");
    return 2;
  }
  if (!write_table(argv[1], kInstances)) return 1;
  if (argc == 3 && !write_table(argv[2], kBackwardInstances)) return 1;
  return 0;
}
