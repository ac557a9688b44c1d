// Four matrices of 8 x 8 elements of 16 bits, from a warp's registers to shared memory.
#pragma once

#include <cute/config.hpp>

#include <cstdint>

namespace hopper_attention {

// words[i]: a lane's two elements of matrix i, in row lane / 4 and columns 2 * (lane % 4) and the
// next.
// address: where row lane % 8 of matrix lane / 8 goes, 16 bytes, in shared memory.
CUTE_DEVICE void store_matrices(std::uint32_t address, std::uint32_t const* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace hopper_attention
