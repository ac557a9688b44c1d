// The tuning of every kernel, and its reasons: ForwardKey -> ForwardConfig at compile time.
#pragma once

#include "hopper_attention/key.h"

namespace hopper_attention {

inline constexpr int kConsumerRows = 64;  // query rows of one consumer warpgroup (WGMMA's M)

// Where a consumer waits for P V within the next block's softmax.
enum class Schedule : int {
  kInterleaved = 0,  // wherever ptxas puts it: after the maxima
  kSplitRows = 1,    // between the exponentials of a thread's first and second row
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

  constexpr int tile_m() const { return num_consumers * kConsumerRows; }
};

// Columns that one TMA box and one swizzle atom span: 128 bytes, or 64 where 128 does not divide.
constexpr int slab_columns(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

// Registers a thread of an accumulator of kConsumerRows x columns: 128 threads share it.
constexpr int accumulator_registers(int columns) { return columns / 2; }

// Cycles: one H200's multiprocessors, s = 16384, 16,384 tokens, hidden size 2048 (docs/performance.md).
constexpr ForwardConfig make_forward_config(ForwardKey key) {
  constexpr auto kInterleaved = Schedule::kInterleaved;
  constexpr auto kSplitRows = Schedule::kSplitRows;
  const bool full = key.mask == MaskKind::kFull;
  if (key.head_dim == 64) {
    return {key, 128, 2, 3, true, kInterleaved, false,
            "three consumers hide exp2; split rows cost 6%, no ping-pong 5 to 7%"};
  }
  if (key.head_dim == 96) {
    return {key, 112, 2, 3, true, kInterleaved, false,
            "three consumers: S 56, P 28 and O 48 registers of 160"};
  }
  if (key.head_dim == 128) {
    return full ? ForwardConfig{key, 176, 2, 2, true, kSplitRows, false,
                                "widest that fits: S 88, P 44, O 64 registers and 208 KiB"}
                : ForwardConfig{key, 128, 2, 2, true, kSplitRows, false,
                                "square tiles waste least on the diagonal; split rows gain 5%"};
  }
  if (key.head_dim == 192 && key.head_dim_v == 128) {
    return {key, 128, 2, 2, true, kSplitRows, false, "208 KiB at two stages"};
  }
  if (key.head_dim == 192) {
    return {key, 112, 2, 2, false, kSplitRows, full, "216 KiB at two stages: the widest that fits"};
  }
  return {key, 80, 2, 2, false, kSplitRows, full,
          "224 KiB at two stages: the widest that fits; ping-pong costs 3%"};
}

}  // namespace hopper_attention
