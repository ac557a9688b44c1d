// Division by a number that the host knows.
#pragma once

#include <cstdint>

#include "hopper_attention/mask.h"

namespace hopper_attention {

// Division of 0 to 2^31 - 1 by a constant in a multiplication and a shift. With 2^(log2 - 1) <
// divisor <= 2^log2 and multiplier = floor(2^(31 + log2) / divisor) + 1, the quotient's error is
// below n / (divisor * 2^31) < 1 / divisor.
struct FastDivide {
  std::uint32_t multiplier = 0;
  std::int32_t shift = 0;
  std::int32_t divisor = 1;

  FastDivide() = default;
  constexpr explicit FastDivide(std::int32_t by) : divisor(by) {
    int log2 = 0;
    while ((std::int64_t{1} << log2) < by) ++log2;
    shift = 31 + log2;
    multiplier = static_cast<std::uint32_t>((std::uint64_t{1} << shift) / by + 1);
  }
  HOPPER_ATTENTION_HD constexpr std::int32_t quotient(std::int32_t n) const {
    return static_cast<std::int32_t>((static_cast<std::uint64_t>(n) * multiplier) >> shift);
  }
};

}  // namespace hopper_attention
