// The tuning of the backward kernels, and its reasons: BackwardKey -> BackwardConfig at compile
// time.
#pragma once

#include "hopper_attention/config.h"
#include "hopper_attention/key.h"

namespace hopper_attention {

// kFull: every query sees every key, and scores are used as they are. kMasked serves any dense
// request without a soft cap, kPacked any packed one; kCapped serves soft caps, dense and packed.
struct BackwardKey {
  Dtype dtype;
  int head_dim;    // the tile's: a request runs in the smallest that holds it
  int head_dim_v;  // likewise
  MaskKind mask;
};

constexpr bool operator==(const BackwardKey& a, const BackwardKey& b) {
  return a.dtype == b.dtype && a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v &&
         a.mask == b.mask;
}

// What the consumers of a block do.
enum class Roles : int {
  kAlike = 0,   // each has kConsumerRows keys of its own: their S, P, dP, dS, dV and dK
  kPaired = 1,  // two share kConsumerRows keys: S, P and dV are the first's, dP, dS and dK the
                // second's, which P reaches through shared memory. Two blocks of neighbouring keys
                // are a cluster: they exchange dS, so that each adds one slice of dQ for all keys
  kThirds = 2,  // three share tile_n keys: each has 64 columns of dK and dV, two have S, P, dP and
                // dS of half of the keys, the last one dQ; P and dS pass through shared memory
};

// How the consumers of a block share the product dQ = dS K, (tile_m x head_dim).
enum class DqSplit : int {
  kRows = 0,     // kConsumerRows query rows each
  kColumns = 1,  // kConsumerRows query rows in all, an equal part of the columns each; in thirds
                 // the last one has all parts, one after the other
};

// How dQ reaches its accumulator in global memory.
enum class DqPath : int {
  kBulk = 0,    // through shared memory, by the producer's bulk reductions
  kDirect = 1,  // by the consumers, out of their registers
};

struct BackwardConfig {
  BackwardKey key;
  int tile_m;         // query rows a step
  int tile_n;         // keys a block: kConsumerRows for each consumer alike, or for both of a pair
  int stages;         // buffers of Q
  int dout_stages;    // of dO, at most as many
  int ds_stages;      // of dS
  int num_consumers;  // warpgroups that multiply
  Roles roles;
  DqSplit dq_split;
  int dq_slices;  // parts that dQ by columns is computed in, one after the other
  DqPath dq_path;
  bool ahead_scores;    // of consumers alike: the next step's S is issued under this one's dK
  bool k_in_registers;  // with late dQ: K is the register operand of S's product
  bool late_dq;         // of consumers alike: dQ is issued behind the next step's dP
  const char* reason;
  bool ds_waits = false;  // of consumers alike: a step waits for an empty buffer of dS, though it
                          // always is: with so many of them a consumer that writes the next one has
                          // seen that all are done with it. Some kernels are the faster for it
};

// The table of choices, a row a kernel.
//
// What bounds these kernels is shared memory's 128 bytes a cycle: a product of 64 x 64 x 16 whose
// operands both lie there reads as long as it multiplies, and dQ in float32 on its way through it
// costs as much again as one such product. One with A in registers or a B of more columns leaves
// time for the rest.
constexpr BackwardConfig make_backward_config(BackwardKey key) {
  constexpr Roles kAlike = Roles::kAlike;
  constexpr Roles kPaired = Roles::kPaired;
  constexpr Roles kThirds = Roles::kThirds;
  constexpr DqSplit kColumns = DqSplit::kColumns;
  constexpr DqSplit kRows = DqSplit::kRows;
  constexpr DqPath kDirect = DqPath::kDirect;
  constexpr DqPath kBulk = DqPath::kBulk;
  const bool ahead = key.mask != MaskKind::kCapped;  // tanh leaves no registers for it
  // clang-format off
  // {key, tile_m, tile_n, stages of Q, dO and dS, consumers, roles, dQ's split, slices, path,
  //  S ahead, K in registers, late dQ, reason[, waits for dS]}
  switch (key.head_dim) {
    case 64:
      return key.mask == MaskKind::kMasked
        ? BackwardConfig{key, 128, 128, 2, 2, 2, 2, kAlike, kRows, 1, kBulk, ahead, false, false,
                         "bulk adds: 1 to 2% faster from 8k on, 5% in a fixed order", true}
        : BackwardConfig{key, 128, 128, 2, 2, 2, 2, kAlike, kRows, 1, kDirect, ahead, false, false,
                         "S and dP 64 registers each, dK and dV 32 each",
                         key.mask != MaskKind::kFull};
    case 96:
      return key.mask == MaskKind::kCapped
        ? BackwardConfig{key, 64, 128, 2, 2, 2, 2, kAlike, kColumns, 1, kBulk, ahead, false, false,
                         "tanh leaves no registers for K and S ahead", true}
        : BackwardConfig{key, 64, 128, 3, 3, 3, 2, kAlike, kColumns, 1, kBulk, ahead, true, true,
                         "24 registers for K: 1 to 13% faster with dQ a step late",
                         key.mask != MaskKind::kFull};
    case 128:
      return {key, 64, 128, 2, 2, 2, 2, kAlike, kColumns, 1, kBulk, ahead, false, false,
              "64 rows: S and dP 32 registers each beside dK and dV of 64 each"};
    case 192:  // V has 192 or 128 columns
      return {key, 64, 96, 2, 1, 1, 3, kThirds, kColumns, 1, kBulk, false, false, false,
              "two with scores of 48 keys, dQ the third's: 10 to 17% over scores of 32 in each"};
    default:
      return {key, 64, 64, 2, 1, 2, 2, kPaired, kColumns, 2, kDirect, false, false, false,
              "64 keys for both consumers, dQ added once for 128: 9 to 25% faster; 226 KiB"};
  }
  // clang-format on
}

}  // namespace hopper_attention
