// What the host must know of an instance of the quantizer's kernel.
#pragma once

namespace hopper_attention {

struct QuantizeGeometry {
  int rows_of_warp;  // tokens of a tile that a warp writes
  int blocks_per_sm;
  int stages;  // tiles that a block loads ahead
  int teams;   // that work on a tile each

  // Whether teams take turns at a stage. Then one of them may come to it while the other one's tile
  // is still on its way there: both tiles of its own that come between may have overtaken that. The
  // barrier of what has arrived would then be a phase behind, and look like one that is ahead. So
  // whoever waits for a tile waits first until the one before it has been read.
  constexpr bool shares_stages() const { return stages % teams != 0; }
};

constexpr QuantizeGeometry quantize_geometry(int tile) {
  return {2048 / tile, tile == 256 ? 1 : 2, tile == 64 ? 5 : 2, tile == 64 ? 2 : 1};
}

}  // namespace hopper_attention
