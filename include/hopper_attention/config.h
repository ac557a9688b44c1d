// The tuning of every kernel, and its reasons: ForwardKey -> ForwardConfig at compile time.
#pragma once

#include "hopper_attention/key.h"

namespace hopper_attention {

inline constexpr int kConsumerRows = 64;  // query rows of one consumer warpgroup (WGMMA's M)
// Keys of a narrow first block: under a causal mask of equal lengths, a consumer's rows end at a
// multiple of these, so that blocks of 64 keys have no use for it.
inline constexpr int kNarrowKeys = kConsumerRows;

// Where, within the next block's softmax, a consumer waits for P V. A thread has two rows.
enum class Schedule : int {
  kAfterMaxima = 0,   // before the exponentials
  kAfterHalfRow = 1,  // after half of the first row's
  kAfterRow = 2,      // after all of the first row's
  kRowByRow = 3,      // as 1, and the second row's maximum is taken under the first's exponentials
};

struct ForwardConfig {
  ForwardKey key;
  int tile_n;         // keys a block
  int stages;         // buffers of K, and as many of V
  int num_consumers;  // warpgroups that multiply, kConsumerRows query rows each
  bool ping_pong;     // alternate the consumers by named barriers
  Schedule schedule;
  bool skip_rescale;  // leave O as it is where no maximum of a warp moved
  const char* reason;
  // Issue the next block's Q K^T ahead of this block's P V, where the registers for both last.
  bool overlap_products = true;
  int v_parts = 1;  // equal parts of head_dim_v, that P V is computed for, two under way at a time
  bool exp_turns = false;  // alternate the consumers at the exponentials, instead of the products
  int exp2_by_fma = 0;     // one exponential in so many is a polynomial on the FMA pipes; 0: none
  bool late_rescale = false;  // rescale O under the next block's Q K^T instead of before it
  bool mask_by_bits = false;  // a row's seen keys as bits of a word: shorter code at a mask's edges
  bool alpha_first = false;   // O's factor ahead of the exponentials, to rescale O under them
  bool free_first = false;    // with turns: a tile's first product of a consumer waits for none
  // S of a tile's first block (its last) has kNarrowKeys keys where a consumer sees no more of it.
  bool narrow_first = false;
  // Issue a tile's first Q K^T under the last tile's epilogue: with Q in two buffers, and the next
  // tile drawn a block of V earlier. It takes no turn.
  bool ahead_first = false;
  int cluster = 1;  // blocks, of neighbouring query tiles of a head, that share loads of K and V

  constexpr int tile_m() const { return num_consumers * kConsumerRows; }
};

// Columns of element_bytes that one TMA box and one swizzle atom span: the widest of 128, 64 and 32
// bytes that divides head_dim.
constexpr int slab_columns(int head_dim, int element_bytes) {
  int columns = 128 / element_bytes;
  while (head_dim % columns != 0) columns /= 2;
  return columns;
}

// Registers a thread of an accumulator of kConsumerRows x columns: 128 threads share it.
constexpr int accumulator_registers(int columns) { return columns / 2; }

// Whether consumers of one tile work through key ranges of their own, and skip the blocks that only
// the others see: worth its instructions (4% at d128) where a tile has more rows than a block keys.
constexpr bool consumers_differ(const ForwardConfig& config) {
  return config.tile_m() > config.tile_n;
}

// Which row of instances.def serves a request: `full` when no key is masked. Up to this many keys,
// the square tiles of the masked d128 kernel beat the wide ones of the full one: their O has shared
// memory of its own, so that the next tile's Q arrives early.
inline constexpr int kShortKeys = 4096;

// Where no row sees more keys, narrow blocks lose less at a mask's edges: at d64 speed is 1.35
// times that of the masked kernel with a window of 128, 1.06 causal at 512 keys, 1.0 with a window
// of 1024, and 0.92 causal at 4096.
inline constexpr int kFewKeys = 1024;

// Blocks share loads of K and V from this many keys on: at d256 pairs cost 2.6% at 512.
inline constexpr int kClusterKeys = 1024;

// most_keys: that a row sees, as Mask has it.
constexpr MaskKind tile_mask(Dtype dtype, int tile_head_dim, bool full, int seqlen_k,
                             int most_keys) {
  const bool wide = is_fp8(dtype) || tile_head_dim != 128 || seqlen_k > kShortKeys;
  if (full && wide && seqlen_k > 0) return MaskKind::kFull;  // whose tiles all have keys
  const bool has_short = !is_fp8(dtype) && tile_head_dim == 64;
  return has_short && most_keys <= kFewKeys ? MaskKind::kShort : MaskKind::kMasked;
}

// The e4m3 kernels. tile_n is the 128 keys of a scale; with an accumulator of its own for each
// block, P V takes as many registers again as O, or a part of it.
constexpr ForwardConfig make_fp8_config(ForwardKey key) {
  constexpr Schedule kAfterMaxima = Schedule::kAfterMaxima;
  // Taking turns at the exponentials pays where tiles are of many lengths (d128: 2.5%); without a
  // mask the consumers find their places by themselves.
  const bool masked = key.mask == MaskKind::kMasked;
  // clang-format off
  // {key, tile_n, stages, consumers, ping-pong, schedule, skip rescale, reason, overlap, v parts,
  //  turns at the exponentials, exponentials per polynomial}
  if (key.dtype == Dtype::kE4M3Fast) {
    return {key, 128, 2, key.head_dim == 64 ? 3 : 2, false, kAfterMaxima, false,
            "O is its own accumulator, as in 16 bits", key.head_dim < 192, 1, false};
  }
  switch (key.head_dim) {
    case 64:
      return {key, 128, 2, 3, false, kAfterMaxima, false,
              "exp2 is the bound: three consumers, 1 in 16 by FMA; 1 in 8 is 4% slower", false, 1,
              false, 16};
    case 96:
      return {key, 128, 2, 2, false, kAfterMaxima, false,
              "S 64, P 16, O 52, a block's P V 52 registers of 240", true, 1, masked};
    case 128:
      return {key, 128, 2, 2, false, kAfterMaxima, false,
              "S 64, P 16, O 68, a block's P V 68 registers of 240", true, 1, masked};
    case 192:
      return {key, 128, 2, 2, false, kAfterMaxima, false,
              "O 96 registers leave no room for S beside P V; two parts, at once", false, 2, false};
    default:
      return {key, 128, 2, 2, false, kAfterMaxima, false,
              "O 128 registers: P V in parts, each folded in under the next, 5 to 10% faster", false, 4,
              false};
  }
  // clang-format on
}

// In clusters of two with multicast: L2 is read half as often, and the power that this saves is a
// higher clock.
constexpr ForwardConfig in_clusters(ForwardConfig config) {
  config.cluster = 2;
  return config;
}

// The table of choices, a row a kernel. The reasons' figures are multiprocessor cycles of an H200
// at s = 16384 (docs/performance.md).
constexpr ForwardConfig make_forward_config(ForwardKey key) {
  constexpr Schedule kAfterMaxima = Schedule::kAfterMaxima;
  constexpr Schedule kAfterRow = Schedule::kAfterRow;
  constexpr Schedule kRowByRow = Schedule::kRowByRow;
  const bool full = key.mask == MaskKind::kFull;
  if (is_fp8(key.dtype)) return make_fp8_config(key);
  // clang-format off
  // {key, tile_n, stages, consumers, ping-pong, schedule, skip rescale, reason, overlap, v parts,
  //  turns at the exponentials, exponentials per polynomial, late rescale, mask by bits,
  //  alpha first, first block without a turn, narrow first block, first product ahead}
  switch (key.head_dim) {
    case 64:
      if (key.mask == MaskKind::kShort) {
        return {key, 64, 6, 3, false, kAfterMaxima, false,
                "a row's few keys begin and end in narrow blocks; with turns 9% slower"};
      }
      return full
        ? ForwardConfig{key, 128, 2, 3, true, kAfterRow, true,
                        "three consumers hide exp2; without ping-pong 4 to 9% slower", true, 1,
                        false, 0, true}
        : ForwardConfig{key, 128, 2, 3, true, kAfterMaxima, false,
                        "three consumers hide exp2; waiting after half a row is 4% slower; a first "
                        "block of all keys costs 2%", true, 1, false, 0, false, true, true, false,
                        true};
    case 96:
      return full
        ? in_clusters({key, 112, 2, 3, true, kAfterRow, false,
                       "three consumers: S 56, P 28 and O 48 registers of 160; in clusters 3% at "
                       "the power limit"})
        : ForwardConfig{key, 96, 2, 3, true, kAfterMaxima, false,
                        "three consumers: S 48, P 24 and O 48 registers of 160; 112 keys spill; a "
                        "first block of all keys costs 3 to 4% up to 1024", true, 1, false, 0,
                        false, false, false, false, true};
    case 128:
      return full
        ? in_clusters({key, 176, 2, 2, true, kRowByRow, true,
                       "widest that fits: S 88, P 44, O 64 registers and 208 KiB; in clusters 4% "
                       "at the power limit", true, 1, false, 0, true})
        : ForwardConfig{key, 128, 2, 2, true, kRowByRow, false,
                        "square tiles waste least on the diagonal; a turn at a tile's first block "
                        "costs 1 to 3%, its product after the last tile's epilogue 1 to 2%", true,
                        1, false, 0, false, true, false, true, false, true};
    case 192:
      if (key.head_dim_v == 128) {
        return full
          ? in_clusters({key, 128, 2, 2, true, kRowByRow, false,
                         "208 KiB at two stages; in clusters 3% at the power limit"})
          : ForwardConfig{key, 128, 2, 2, false, kRowByRow, false,
                          "208 KiB at two stages; turns cost 1 to 2% with masks by bits", true, 1,
                          false, 0, false, true};
      }
      return full
        ? in_clusters({key, 112, 2, 2, false, kRowByRow, true,
                       "216 KiB at two stages: the widest that fits; in clusters 3% at the power "
                       "limit"})
        : ForwardConfig{key, 112, 2, 2, false, kRowByRow, false,
                        "216 KiB at two stages: the widest that fits", true, 1, false, 0, false,
                        true};
    default:
      return full
        ? in_clusters({key, 80, 2, 2, false, kRowByRow, true,
                       "224 KiB at two stages: the widest that fits; in clusters 2% at the power "
                       "limit"})
        : ForwardConfig{key, 80, 2, 2, false, kRowByRow, true,
                        "224 KiB at two stages: the widest that fits; ping-pong costs 3%", true, 1,
                        false, 0, false, true};
  }
  // clang-format on
}

}  // namespace hopper_attention
