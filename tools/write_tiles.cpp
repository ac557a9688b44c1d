// Writes tiles.json: what config.h chooses for every row of hopper/forward/instances.def.
// The emulation reads its tile sizes there, so that it and the kernels cannot disagree.
#include <cstdio>

#include "hopper_attention/budget.h"
#include "hopper_attention/fp8.h"

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

// The fewest keys of a request that a row serves; one with fewer runs in the masked row.
int min_keys(const ForwardKey& key) {
  const bool short_too = tile_mask(key.dtype, key.head_dim, true, 0) == MaskKind::kFull;
  return key.mask == MaskKind::kMasked || short_too ? 0 : kShortKeys + 1;
}

void write_row(std::FILE* file, const Instance& instance, bool last) {
  const ForwardConfig config = make_forward_config(instance.key);
  std::fprintf(file,
               "  {\"name\": \"%s\", \"dtype\": \"%s\", \"head_dim\": %d, \"head_dim_v\": %d, "
               "\"mask\": \"%s\", \"tile_m\": %d, \"tile_n\": %d, \"stages\": %d, "
               "\"num_consumers\": %d, \"min_keys\": %d, \"v_parts\": %d, "
               "\"sums_by_ones\": %s, \"slack\": %g, \"offset\": %d}%s\n",
               instance.name, name_of(instance.key.dtype), instance.key.head_dim,
               instance.key.head_dim_v, name_of(instance.key.mask), config.tile_m(), config.tile_n,
               config.stages, config.num_consumers, min_keys(instance.key), config.v_parts,
               sums_by_ones(config) ? "true" : "false",
               sums_by_ones(config) ? double{kMaximumSlack} : 0.0,
               is_fp8(instance.key.dtype) ? kOffsetLog2 : 0, last ? "" : ",");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: write_tiles FILE\n");
    return 2;
  }
  std::FILE* file = std::fopen(argv[1], "w");
  if (file == nullptr) {
    std::fprintf(stderr, "write_tiles: cannot open %s for writing\n", argv[1]);
    return 1;
  }
  std::fputs("[\n", file);
  const Instance* const end = kInstances + sizeof(kInstances) / sizeof(kInstances[0]);
  for (const Instance* row = kInstances; row != end; ++row) write_row(file, *row, row + 1 == end);
  std::fputs("]\n", file);
  if (std::fclose(file) != 0) {
    std::fprintf(stderr, "write_tiles: cannot write %s\n", argv[1]);
    return 1;
  }
  return 0;
}
