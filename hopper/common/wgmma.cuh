// Issuing a tile's product to the tensor cores.
#pragma once

#include <cute/tensor.hpp>

namespace hopper_attention {

// Issues acc = A B (kFresh) or acc += A B for one tile and closes the group; the caller waits with
// cute::warpgroup_wait. A is in shared memory (descriptors) or in registers, B in shared memory.
template <bool kFresh, class TiledMma, class TensorA, class TensorB, class TensorC>
CUTE_DEVICE void issue_product(TiledMma& mma, TensorA& a, TensorB const& b, TensorC& acc) {
  constexpr bool kRegisterA =
      !cute::is_base_of<cute::GMMA::DescriptorIterator, typename TiledMma::FrgTypeA>::value;
  if constexpr (kRegisterA) cute::warpgroup_fence_operand(a);
  cute::warpgroup_fence_operand(acc);
  cute::warpgroup_arrive();
  mma.accumulate_ = kFresh ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), acc);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(acc);
  if constexpr (kRegisterA) cute::warpgroup_fence_operand(a);
}

}  // namespace hopper_attention
