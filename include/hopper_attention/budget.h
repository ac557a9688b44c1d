// What a config costs: shared-memory bytes, registers, threads and barrier arrival counts.
#pragma once

#include "hopper_attention/config.h"

namespace hopper_attention {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kMaxSharedBytes = 227 * 1024;  // what one block may have on Hopper
inline constexpr int kRegisterFile = 64 * 1024;
inline constexpr int kElementBytes = 2;  // float16 and bfloat16
inline constexpr int kTileSlots = 2;  // work tiles that travel from the producer to the consumers

struct RegisterSplit {
  int launch;    // a thread's at launch, before setmaxnreg
  int producer;  // after it
  int consumer;
};

// setmaxnreg takes multiples of 8; a split shares what the block got at launch, which ptxas chooses
// as the register file over the threads, rounded down to a multiple of 8.
constexpr RegisterSplit register_split(int num_consumers) {
  if (num_consumers <= 2) return {168, 24, 240};
  return num_consumers == 3 ? RegisterSplit{128, 32, 160} : RegisterSplit{96, 32, 112};
}

constexpr int num_threads(const ForwardConfig& config) {
  return (config.num_consumers + 1) * kWarpgroupThreads;
}

constexpr int q_bytes(const ForwardConfig& config) {
  return config.tile_m() * config.key.head_dim * kElementBytes;
}
constexpr int o_bytes(const ForwardConfig& config) {
  return config.tile_m() * config.key.head_dim_v * kElementBytes;
}
constexpr int k_stage_bytes(const ForwardConfig& config) {
  return config.tile_n * config.key.head_dim * kElementBytes;
}
constexpr int v_stage_bytes(const ForwardConfig& config) {
  return config.tile_n * config.key.head_dim_v * kElementBytes;
}
constexpr int kv_bytes(const ForwardConfig& config) {
  return config.stages * (k_stage_bytes(config) + v_stage_bytes(config));
}

// One full and one empty barrier for each stage of K and V, each consumer's Q and each tile slot;
// 8 bytes each, and 4 bytes a tile slot for the tile's index.
constexpr int barrier_bytes(const ForwardConfig& config) {
  const int barriers = 2 * (2 * config.stages + config.num_consumers + kTileSlots);
  return barriers * 8 + kTileSlots * 4;
}

constexpr int kSharedAlignment = 1024;  // the 128-byte swizzle repeats every 1024 bytes
constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// O leaves through shared memory. It has its own where there is room, so that the next tile's Q can
// arrive while O leaves; else a consumer's O overwrites that consumer's Q.
constexpr bool o_overlays_q(const ForwardConfig& config) {
  const int separate = kv_bytes(config) + q_bytes(config) + o_bytes(config);
  return round_up(separate + barrier_bytes(config), kSharedAlignment) > kMaxSharedBytes;
}

constexpr int shared_bytes(const ForwardConfig& config) {
  const int tensors =
      kv_bytes(config) + q_bytes(config) + (o_overlays_q(config) ? 0 : o_bytes(config));
  return round_up(tensors + barrier_bytes(config), kSharedAlignment);
}

// Accumulators and P of one consumer thread. What is left of RegisterSplit::consumer holds the row
// statistics, addresses and temporaries; under about 20 the compiler spills.
constexpr int fragment_registers(const ForwardConfig& config) {
  return accumulator_registers(config.tile_n) + accumulator_registers(config.tile_n) / 2 +
         accumulator_registers(config.key.head_dim_v);
}

// Why a config cannot be built; null when it can.
constexpr const char* config_error(const ForwardConfig& config) {
  const RegisterSplit split = register_split(config.num_consumers);
  if (config.num_consumers < 2 || config.num_consumers > 4) return "2 to 4 consumers";
  if (config.tile_n % 16 != 0 || config.tile_n > 256)
    return "tile_n: a multiple of 16, at most 256";
  if (config.key.head_dim % 32 != 0 || config.key.head_dim_v % 32 != 0) return "head dim: 32s";
  if (config.key.head_dim_v > config.key.head_dim) return "head_dim_v above head_dim";
  if (config.stages < 2) return "at least two stages";
  if (shared_bytes(config) > kMaxSharedBytes) return "shared memory above 227 KiB";
  if (fragment_registers(config) + 20 > split.consumer) return "registers";
  return nullptr;
}

}  // namespace hopper_attention
