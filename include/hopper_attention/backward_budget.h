// What a backward config costs: shared-memory bytes, registers and threads.
#pragma once

#include "hopper_attention/backward_config.h"
#include "hopper_attention/budget.h"

namespace hopper_attention {

// Of Q, K, V, dO, P and dS: 16 bits.
inline constexpr int kElementBytes = 2;

constexpr int num_threads(const BackwardConfig& config) {
  return (config.num_consumers + 1) * kWarpgroupThreads;
}
// Consumers that share a block's keys: two have the scores of half each, all have gradients of all.
constexpr bool in_thirds(const BackwardConfig& config) { return config.roles == Roles::kThirds; }
// Of thirds: consumers that have scores. The last one has dQ.
inline constexpr int kScorers = 2;
// Pairs of consumers are always in clusters, and nobody else is.
constexpr bool is_clustered(const BackwardConfig& config) { return config.roles == Roles::kPaired; }
constexpr int cluster_blocks(const BackwardConfig& config) { return is_clustered(config) ? 2 : 1; }
// Keys whose queries a block goes through: those of its cluster, or its own.
constexpr int cluster_keys(const BackwardConfig& config) {
  return cluster_blocks(config) * config.tile_n;
}
// Columns of dQ that a block of a cluster adds, for which it has the other block's keys, too.
constexpr int peer_columns(const BackwardConfig& config) {
  return is_clustered(config) ? config.key.head_dim / cluster_blocks(config) : 0;
}
// Of thirds: consumers that have columns of a gradient, as far as there are 64 for each.
constexpr int gradient_parts(const BackwardConfig& config, int columns) {
  return in_thirds(config) ? columns / kConsumerRows : 1;
}
// Keys of dK and dV that one consumer stores.
constexpr int gradient_rows(const BackwardConfig& config) {
  return in_thirds(config) ? config.tile_n : kConsumerRows;
}

// Columns of one slab of K. dQ by columns reads K in pieces of whole slabs.
constexpr int key_slab_columns(const BackwardConfig& config) {
  const int head_dim = config.key.head_dim;
  const bool by_columns = config.dq_split == DqSplit::kColumns;
  const int piece = by_columns ? head_dim / (config.num_consumers * config.dq_slices) : head_dim;
  return slab_columns(piece, kElementBytes);
}

constexpr int q_stage_bytes(const BackwardConfig& config) {
  return config.tile_m * config.key.head_dim * kElementBytes;
}
constexpr int dout_stage_bytes(const BackwardConfig& config) {
  return config.tile_m * config.key.head_dim_v * kElementBytes;
}
constexpr bool are_alike(const BackwardConfig& config) { return config.roles == Roles::kAlike; }
// Blocks whose consumers are alike are persistent: they take one tile of keys after the other, and
// what comes before a tile's first step and after its last runs under its neighbours' steps. Soft
// caps leave no registers for that: with them a block has one tile.
constexpr bool is_persistent(const BackwardConfig& config) {
  return are_alike(config) && config.key.mask != MaskKind::kCapped;
}
// Tiles that a block knows of at a time: one at work, and the next one, or the last one while its
// gradients leave. Each has a buffer of K.
constexpr int tile_slots(const BackwardConfig& config) { return is_persistent(config) ? 2 : 1; }
constexpr int key_buffer_bytes(const BackwardConfig& config) {
  return config.tile_n * config.key.head_dim * kElementBytes;
}
constexpr int value_buffer_bytes(const BackwardConfig& config) {
  return config.tile_n * config.key.head_dim_v * kElementBytes;
}
constexpr int ds_stage_bytes(const BackwardConfig& config) {
  return config.tile_m * config.tile_n * kElementBytes;
}
constexpr int dq_elements(const BackwardConfig& config) {
  return config.tile_m * config.key.head_dim;
}
// Of a cluster's other block: keys, and a copy of dS for each buffer of dS.
constexpr int peer_bytes(const BackwardConfig& config) {
  if (!is_clustered(config)) return 0;
  return config.tile_n * peer_columns(config) * kElementBytes +
         config.ds_stages * ds_stage_bytes(config);
}
// Where a buffer is not needed it has these.
inline constexpr int kNoBufferBytes = 16;
constexpr int dq_bytes(const BackwardConfig& config) {
  return config.dq_path == DqPath::kBulk ? dq_elements(config) * 4 : kNoBufferBytes;
}
// P in float32, on its way to the consumer that needs it for dS.
constexpr int p_bytes(const BackwardConfig& config) {
  return is_clustered(config) ? config.tile_m * config.tile_n * 4 : kNoBufferBytes;
}
// P in 16 bits, as many buffers as of dS.
constexpr int p16_bytes(const BackwardConfig& config) {
  return in_thirds(config) ? config.ds_stages * ds_stage_bytes(config) : 0;
}
// Delta comes with dO, but in a cluster, which gives dO back behind dP, with Q.
constexpr int delta_stages(const BackwardConfig& config) {
  return is_clustered(config) ? config.stages : config.dout_stages;
}
// LSE and delta of each stage's rows.
constexpr int statistics_bytes(const BackwardConfig& config) {
  return (config.stages + delta_stages(config)) * config.tile_m * 4;
}
// A full and an empty barrier for each stage of Q, dO and dS, for each consumer's part of dQ and
// for P; one full barrier for K and one for V, and in a cluster for each copy of the other block's
// dS; 8 bytes each.
constexpr int barrier_bytes(const BackwardConfig& config) {
  const int of_tiles = are_alike(config) ? 5 * tile_slots(config) + 2 : 2;
  return 8 * (of_tiles + 2 * (config.stages + config.dout_stages) +
              (is_clustered(config) ? 3 : 2) * config.ds_stages + 2 * config.num_consumers + 2);
}
// Which key block is whose, where that is read from a list.
constexpr bool is_ragged(const BackwardConfig& config) {
  return config.key.mask == MaskKind::kPacked || config.key.mask == MaskKind::kCapped;
}
constexpr int tile_bytes(const BackwardConfig& config) {
  return is_persistent(config) || is_ragged(config) ? 64 * tile_slots(config) : 0;
}
constexpr int shared_bytes(const BackwardConfig& config, int value_buffers) {
  const int tensors =
      tile_slots(config) * key_buffer_bytes(config) + value_buffers * value_buffer_bytes(config) +
      config.stages * q_stage_bytes(config) + config.dout_stages * dout_stage_bytes(config) +
      peer_bytes(config) + config.ds_stages * ds_stage_bytes(config) + dq_bytes(config) +
      p_bytes(config) + p16_bytes(config);
  return round_up(tensors + statistics_bytes(config) + tile_bytes(config) + barrier_bytes(config),
                  kSharedAlignment);
}
// As many of V as of K where there is room: then dV leaves through its tile's V. Else V has one,
// which is loaded again right behind a tile's last dP, and dV leaves through dS's buffers.
constexpr int value_buffers(const BackwardConfig& config) {
  const int slots = tile_slots(config);
  return shared_bytes(config, slots) <= kMaxSharedBytes ? slots : 1;
}
constexpr int shared_bytes(const BackwardConfig& config) {
  return shared_bytes(config, value_buffers(config));
}

// Accumulators and 16-bit operands of one consumer thread at its fullest: its gradients always; S
// and dP together, or the next S beside dQ. Of a pair each has one gradient, and one of S and dP;
// of thirds 64 columns of both gradients, and half of S and dP, or a part of dQ. Late, dQ is there
// beside both.
constexpr int fragment_registers(const BackwardConfig& config) {
  const int dk = accumulator_registers(config.key.head_dim);
  const int dv = accumulator_registers(config.key.head_dim_v);
  const int scores = accumulator_registers(config.tile_m);
  const int dq =
      dq_elements(config) / (config.num_consumers * kWarpgroupThreads * config.dq_slices);
  if (in_thirds(config)) {
    const int part = accumulator_registers(config.tile_n / kScorers);
    return 2 * accumulator_registers(config.tile_n) + (dq > 2 * part ? dq : 2 * part);
  }
  if (is_clustered(config)) return (dk > dv ? dk : dv) + scores + scores / 2 + dq;
  if (config.late_dq) {
    const int keys = config.k_in_registers ? config.key.head_dim / 4 : 0;  // 64 rows, 16 bits
    return dk + dv + 2 * scores + dq + keys;
  }
  return dk + dv + scores + (dq > scores ? dq : scores);
}
// What a consumer's thread needs beside them: in thirds no product has an operand in registers.
constexpr int other_registers(const BackwardConfig& config) { return in_thirds(config) ? 16 : 20; }

// Columns of the swizzle atom that spans `columns` of dS: 128, 64 or 32 bytes.
constexpr int ds_slab_columns(int columns) {
  return columns % 64 == 0 ? 64 : columns % 32 == 0 ? 32 : 16;
}

// A block adds one slice of dQ. The second consumer's products are a step late, so that Q and dS of
// two steps are there at the same time, and dO of one.
constexpr const char* cluster_error(const BackwardConfig& config) {
  if (config.tile_n != kConsumerRows || config.num_consumers != 2)
    return "a cluster: blocks of 2 consumers, tile_n 64";
  if (config.dq_split != DqSplit::kColumns || config.dq_path != DqPath::kDirect)
    return "a cluster: dQ by columns, directly";
  if (config.dq_slices != cluster_blocks(config)) return "a cluster: a slice of dQ for each block";
  if (config.stages < 2 || config.ds_stages != config.stages)
    return "a cluster: 2 stages or more, as many of dS";
  if (config.dout_stages > config.stages) return "a cluster: stages of dO: 1 to those of Q";
  return nullptr;
}
// The next step's S is issued before this one's Q is given back, so there are two stages of Q. That
// dO has one is what the consumers rely on (thirds_mma.cuh). Half of the keys are whole pieces of
// 16 columns of P and dS, in slabs of 32 (part_mma.cuh).
constexpr const char* thirds_error(const BackwardConfig& config) {
  if (config.num_consumers != 3 || config.tile_n % 64 != 32)
    return "thirds: 3 consumers, tile_n 64s and 32";
  if (config.dq_split != DqSplit::kColumns || config.dq_slices != 1)
    return "thirds: dQ by columns, in one slice";
  if (config.dq_path != DqPath::kBulk) return "thirds: dQ by bulk adds";
  if (config.key.head_dim != 3 * kConsumerRows ||
      (config.key.head_dim_v != 2 * kConsumerRows && config.key.head_dim_v != 3 * kConsumerRows))
    return "thirds: head dim 192, V's 128 or 192";
  if (config.stages < 2) return "thirds: 2 stages of Q or more";
  if (config.dout_stages != 1 || config.ds_stages != 1) return "thirds: one stage of dO and of dS";
  if (config.ahead_scores) return "thirds: S is ahead as it is";
  return nullptr;
}

// Buffers of dS that consumers alike need where none waits for an empty one. Who writes a step's dS
// has waited for the last step's to be complete, that is, for every consumer's arrival there, which
// comes behind its dQ of the step before; where dQ is late, of the step before that one.
constexpr int free_ds_stages(const BackwardConfig& config) { return config.late_dq ? 3 : 2; }

// Why a config cannot be built; null when it can.
constexpr const char* config_error(const BackwardConfig& config) {
  const RegisterSplit split = register_split(config.num_consumers);
  const DqSplit dq_split = config.dq_split;
  const int all_rows = config.num_consumers * kConsumerRows;
  if (config.num_consumers < 2 || config.num_consumers > 3) return "2 or 3 consumers";
  if (config.stages < 1 || config.dout_stages < 1 || config.ds_stages < 1) return "stages";
  if (config.tile_m % 16 != 0) return "tile_m: a multiple of 16";
  if (are_alike(config) && config.tile_n != all_rows) return "tile_n: 64 a consumer";
  if (in_thirds(config) && thirds_error(config) != nullptr) return thirds_error(config);
  if (is_clustered(config) && cluster_error(config) != nullptr) return cluster_error(config);
  if (config.dq_slices != 1 && dq_split != DqSplit::kColumns) return "slices: dQ by columns";
  if (dq_split == DqSplit::kRows && config.tile_m != all_rows)
    return "dQ by rows: tile_m 64 a consumer";
  if (dq_split == DqSplit::kColumns && config.tile_m != kConsumerRows)
    return "dQ by columns: tile_m 64";
  if (config.k_in_registers && !config.late_dq) return "K in registers: dQ late";
  if (config.late_dq && (!are_alike(config) || !config.ahead_scores))
    return "dQ late: consumers alike, S ahead";
  if (config.late_dq && (config.stages < 2 || config.ds_stages != config.stages))
    return "dQ late: 2 stages or more, as many of dS";
  if (config.late_dq && config.dq_slices != 1) return "dQ late: one slice";
  if (shared_bytes(config) > kMaxSharedBytes) return "shared memory above 227 KiB";
  if (fragment_registers(config) + other_registers(config) > split.consumer) return "registers";
  if (!in_thirds(config) && !is_clustered(config) && config.dout_stages != config.stages)
    return "as many stages of dO as of Q";
  if (are_alike(config) && !config.ds_waits && config.ds_stages < free_ds_stages(config))
    return "dS not waited for: 2 stages of it, with late dQ 3";
  if (!are_alike(config) && config.ds_waits) return "dS waited for: consumers alike";
  return nullptr;
}

}  // namespace hopper_attention
