// The tensor cores' instructions for 16-bit numbers, and those that bring matrices of 8 x 8 of them
// from and to shared memory.
#pragma once

#include "quantize/task.cuh"

namespace hopper_attention {

template <class Element>
constexpr std::uint32_t kOne = 0x3c00;
template <>
constexpr std::uint32_t kOne<__nv_bfloat16> = 0x3f80;

// d = a b: 16 x 16, 16 channels x 8 tokens.
__device__ inline void multiply(const uint4& a, std::uint32_t b0, std::uint32_t b1, float (&d)[4],
                                __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(0.0f));
}
__device__ inline void multiply(const uint4& a, std::uint32_t b0, std::uint32_t b1, float (&d)[4],
                                __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ inline uint4 load_matrices(const uint4* from) {
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(cute::cast_smem_ptr_to_uint(from))
               : "memory");
  return words;
}

// A lane names a row of 16 bytes of one of four matrices: its matrix is lane / 8.
__device__ inline void store_transposed(uint4* to, const std::uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   cute::cast_smem_ptr_to_uint(to)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace hopper_attention
