// What a config costs: shared-memory bytes, registers, threads and barrier arrival counts.
#pragma once

#include "hopper_attention/config.h"

namespace hopper_attention {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kMaxSharedBytes = 227 * 1024;  // what one block may have on Hopper
inline constexpr int kRegisterFile = 64 * 1024;
inline constexpr int kOutputBytes = 2;  // float16 and bfloat16
inline constexpr int kRawStages = 2;    // blocks of e4m3 V that wait to be transposed
inline constexpr int kOnesRows = 8;     // the fewest columns by which a WGMMA can grow
inline constexpr int kTransposeWarps = 2;
inline constexpr int kTileMessageBytes = 16;
inline constexpr int kTileSequenceBytes = 16;  // beside it in packed batches

struct RegisterSplit {
  int launch;    // a thread's at launch, before setmaxnreg
  int producer;  // after it
  int consumer;
};

// setmaxnreg takes multiples of 8; a split shares what the block got at launch, which ptxas chooses
// as the register file over the threads, rounded down to a multiple of 8.
constexpr RegisterSplit register_split(int num_consumers) {
  return num_consumers <= 2 ? RegisterSplit{168, 24, 240} : RegisterSplit{128, 32, 160};
}

constexpr bool is_clustered(const ForwardConfig& config) { return config.cluster > 1; }

constexpr int num_threads(const ForwardConfig& config) {
  return (config.num_consumers + 1) * kWarpgroupThreads;
}

// Where e4m3 blocks are folded in float32, a row of ones behind V's channels has the tensor cores
// sum the rows of P. Where P V is cut into parts it belongs to the last one.
constexpr bool sums_by_ones(const ForwardConfig& config) {
  return config.key.dtype == Dtype::kE4M3;
}
// Whether V may come as rows of tokens and be transposed here: 8-bit operands must lie along K.
constexpr bool may_transpose(const ForwardConfig& config) {
  return is_fp8(config.key.dtype) && config.key.mask == MaskKind::kMasked;
}

// Whether row sums have a place in shared memory, for the requests that cannot use the ones.
constexpr bool keeps_row_sums(const ForwardConfig& config) {
  return sums_by_ones(config) && config.key.mask == MaskKind::kMasked;
}
constexpr int row_sum_bytes(const ForwardConfig& config) {
  return keeps_row_sums(config) ? config.tile_m() * 4 : 0;
}

// Buffers of Q: the next tile's first product begins before this tile's Q is free.
constexpr int q_stages(const ForwardConfig& config) { return config.ahead_first ? 2 : 1; }
constexpr int q_bytes(const ForwardConfig& config) {
  return q_stages(config) * config.tile_m() * config.key.head_dim * element_bytes(config.key.dtype);
}
constexpr int o_bytes(const ForwardConfig& config) {
  return config.tile_m() * config.key.head_dim_v * kOutputBytes;
}
constexpr int k_stage_bytes(const ForwardConfig& config) {
  return config.tile_n * config.key.head_dim * element_bytes(config.key.dtype);
}
constexpr int v_stage_bytes(const ForwardConfig& config) {
  const int rows = config.key.head_dim_v + (sums_by_ones(config) ? kOnesRows : 0);
  return config.tile_n * rows * element_bytes(config.key.dtype);
}
constexpr int raw_bytes(const ForwardConfig& config) {
  return may_transpose(config) ? kRawStages * config.tile_n * config.key.head_dim_v : 0;
}
constexpr int kv_bytes(const ForwardConfig& config) {
  return config.stages * (k_stage_bytes(config) + v_stage_bytes(config)) + raw_bytes(config) +
         row_sum_bytes(config);
}

constexpr bool is_packed(const ForwardConfig& config) {
  return config.key.mask == MaskKind::kPacked;
}

// Work tiles that travel from the producer to the consumers. The slot of a tile is held until its
// epilogue's end: with two, the tile after the next would be told, and its Q asked for, only then.
constexpr int tile_slots(const ForwardConfig& config) {
  return is_packed(config) && config.ahead_first ? 4 : 2;
}

// One full and one empty barrier for each stage of K and V, each buffer of Q and each tile slot,
// and for each block to transpose, one for each stage of V whose last rows are cleared and for each
// consumer's O, and in a cluster for each stage that the other block waits for; 8 bytes each, and
// 16 bytes a tile slot for the tile, in packed batches 32.
constexpr int barrier_bytes(const ForwardConfig& config) {
  const int raw_stages = may_transpose(config) ? kRawStages : 0;
  const int tail_stages = is_packed(config) ? config.stages + config.stages % 2 : 0;  // 16 bytes
  const int outputs =
      is_fp8(config.key.dtype) ? 0 : config.num_consumers + config.num_consumers % 2;  // likewise
  const int queries = q_stages(config) * config.num_consumers;
  const int barriers = 2 * (2 * config.stages + queries + tile_slots(config) + raw_stages) +
                       tail_stages + outputs + (is_clustered(config) ? 2 * config.stages : 0);
  const int message = kTileMessageBytes + (is_packed(config) ? kTileSequenceBytes : 0);
  return barriers * 8 + tile_slots(config) * message;
}

constexpr int kSharedAlignment = 1024;  // the 128-byte swizzle repeats every 1024 bytes
constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// O leaves through shared memory. It has its own where there is room, so that the next tile's loads
// can arrive while O leaves. Else it overwrites V in 16 bits: the next tile's first product and
// softmax need Q and K alone. In e4m3, where V is half as large as O, a consumer's O overwrites
// that consumer's Q, or, where V comes transposed, the buffers in which it would be.
constexpr bool o_overlays(const ForwardConfig& config) {
  const int separate = kv_bytes(config) + q_bytes(config) + o_bytes(config);
  return round_up(separate + barrier_bytes(config), kSharedAlignment) > kMaxSharedBytes;
}
constexpr bool o_overlays_v(const ForwardConfig& config) {
  return !is_fp8(config.key.dtype) && o_overlays(config);
}
constexpr bool o_overlays_q(const ForwardConfig& config) {
  return is_fp8(config.key.dtype) && o_overlays(config);
}

// Whether every tile goes through a block of keys, one that no row sees if there is no other. With
// ahead_first a tile's first product is issued before anyone looks. Where O lies on V, consumers
// could be done with a tile without keys before the producer has seen that the last tile's O has
// left: a barrier that is two phases ahead looks as if it were none ahead.
constexpr bool never_empty(const ForwardConfig& config) {
  return config.ahead_first || (o_overlays_v(config) && config.key.mask != MaskKind::kFull);
}

constexpr int shared_bytes(const ForwardConfig& config) {
  const int tensors =
      kv_bytes(config) + q_bytes(config) + (o_overlays(config) ? 0 : o_bytes(config));
  return round_up(tensors + barrier_bytes(config), kSharedAlignment);
}

constexpr bool raw_holds_o(const ForwardConfig& config) {
  return o_overlays_q(config) && raw_bytes(config) >= o_bytes(config);
}

// O that overlays Q leaves in as many rounds as it is larger.
constexpr int o_rounds(const ForwardConfig& config) {
  return o_overlays_q(config) ? round_up(o_bytes(config), q_bytes(config)) / q_bytes(config) : 1;
}

// Accumulators and P of one consumer thread. What is left of RegisterSplit::consumer holds the row
// statistics, addresses and temporaries; under about 20 the compiler spills.
constexpr int fragment_registers(const ForwardConfig& config) {
  const int s = accumulator_registers(config.tile_n);
  const int p = s * element_bytes(config.key.dtype) / 4;
  const int ones = sums_by_ones(config) ? accumulator_registers(kOnesRows) : 0;
  const int channels = accumulator_registers(config.key.head_dim_v);
  if (config.key.dtype != Dtype::kE4M3) return s + p + channels;
  // Of one block's P V: all, or two of its parts.
  const int part = (config.v_parts == 1 ? channels : 2 * (channels / config.v_parts)) + ones;
  const int o = channels + (config.v_parts == 1 ? ones : 2);  // or the sums of a thread's two rows
  if (config.overlap_products) return s + p + o + part;
  return o + (s > p + part ? s : p + part);
}

// Why a config cannot be built; null when it can.
constexpr const char* config_error(const ForwardConfig& config) {
  const RegisterSplit split = register_split(config.num_consumers);
  if (config.num_consumers < 2 || config.num_consumers > 3) return "2 or 3 consumers";
  if (config.tile_n % 16 != 0 || config.tile_n > 256)
    return "tile_n: a multiple of 16, at most 256";
  const bool fp8 = is_fp8(config.key.dtype);
  const bool full = config.key.mask == MaskKind::kFull;
  if (fp8 && config.tile_n != 64 && config.tile_n != 128) return "tile_n: 64 or 128 in e4m3";
  const bool fp8_choice =
      config.v_parts != 1 || !config.overlap_products || config.exp2_by_fma != 0;
  if (!fp8 && fp8_choice) return "a choice of e4m3 alone";
  const bool bits16_choice = config.late_rescale || config.mask_by_bits || config.alpha_first ||
                             config.free_first || config.narrow_first || config.ahead_first;
  if (fp8 && bits16_choice) return "a choice of 16 bits alone";
  if (config.narrow_first && (full || config.tile_n <= kNarrowKeys))
    return "narrow_first: with a mask, and tile_n above 64";
  if (config.ahead_first && (full || config.narrow_first))
    return "ahead_first: with a mask, all keys of the first block";
  if (config.ahead_first && consumers_differ(config))
    return "ahead_first: as many keys a block as rows, so that no consumer skips blocks";
  if (config.ahead_first && config.ping_pong && !config.free_first)
    return "ahead_first: the first product takes no turn (free_first)";
  if (config.exp2_by_fma < 0 || config.exp2_by_fma > config.tile_n / 4)
    return "exp2_by_fma: 0 to the exponentials of a row in a thread";
  if (config.ping_pong && config.exp_turns) return "one kind of turns";
  if (config.overlap_products && config.v_parts != 1) return "parts and overlap of products";
  if (config.key.head_dim_v % (8 * config.v_parts) != 0) return "v_parts must divide head_dim_v";
  if (config.key.head_dim % 32 != 0 || config.key.head_dim_v % 32 != 0) return "head dim: 32s";
  if (config.key.head_dim_v > config.key.head_dim) return "head_dim_v above head_dim";
  if (config.stages < 2) return "at least two stages";
  if (config.cluster < 1 || config.cluster > 2) return "cluster: 1 or 2 blocks";
  if (is_clustered(config) && (fp8 || !full)) return "a cluster: 16 bits without a mask";
  if (shared_bytes(config) > kMaxSharedBytes) return "shared memory above 227 KiB";
  if (fragment_registers(config) + 16 > split.consumer) return "registers";
  return nullptr;
}

}  // namespace hopper_attention
