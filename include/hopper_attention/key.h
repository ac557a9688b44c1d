// What a caller may ask of a kernel: the key that finds a row of hopper/forward/instances.def.
#pragma once

namespace hopper_attention {

// What Q, K and V are made of, and for e4m3 also how its products are added up: kE4M3 folds the
// blocks together in float32, kE4M3Fast leaves it to the tensor cores.
enum class Dtype : int { kFloat16 = 0, kBfloat16 = 1, kE4M3 = 2, kE4M3Fast = 3 };

constexpr bool is_fp8(Dtype dtype) { return dtype == Dtype::kE4M3 || dtype == Dtype::kE4M3Fast; }
constexpr int element_bytes(Dtype dtype) { return is_fp8(dtype) ? 1 : 2; }

// kFull: every query sees every key, and scores are used as they are.
// kMasked: causal masks, windows, soft caps and scales that are not positive, all at run time; so
// it can serve any request, and serves full ones where its tiles are faster (config.h's tile_mask).
// In e4m3 kFull also means that V is stored transposed and no scale belongs to a single key.
// kPacked: kMasked for packed batches, whose lengths lie on the device.
// kCapped: kMasked and kPacked with a soft cap; of the backward pass only, where they do without.
// kShort: kMasked for rows that see few keys, short sequences and narrow windows; of the forward
// pass only.
enum class MaskKind : int { kFull = 0, kMasked = 1, kPacked = 2, kCapped = 3, kShort = 4 };

struct ForwardKey {
  Dtype dtype;
  int head_dim;    // the tile's: a request runs in the smallest that holds it
  int head_dim_v;  // likewise
  MaskKind mask;
};

constexpr bool operator==(const ForwardKey& a, const ForwardKey& b) {
  return a.dtype == b.dtype && a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v &&
         a.mask == b.mask;
}

constexpr const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fn_fast"};
  return kNames[static_cast<int>(dtype)];
}

constexpr const char* name_of(MaskKind mask) {
  constexpr const char* kNames[] = {"full", "masked", "packed", "capped", "short"};
  return kNames[static_cast<int>(mask)];
}

struct HeadDims {
  int qk;
  int v;
};

// The head dimensions that kernels are compiled for, in the order in which a request tries them.
inline constexpr HeadDims kForwardHeadDims[] = {{64, 64},   {96, 96},   {128, 128},
                                                {192, 128}, {192, 192}, {256, 256}};

// Of these, e4m3 has only the pairs of equal ones.
constexpr bool has_head_dims(Dtype dtype, HeadDims dims) {
  return !is_fp8(dtype) || dims.qk == dims.v;
}

// The smallest compiled pair that holds (head_dim, head_dim_v); {0, 0} when none does.
constexpr HeadDims tile_head_dims(Dtype dtype, int head_dim, int head_dim_v) {
  for (const HeadDims& dims : kForwardHeadDims) {
    if (!has_head_dims(dtype, dims)) continue;
    if (head_dim <= dims.qk && head_dim_v <= dims.v) return dims;
  }
  return {0, 0};
}

}  // namespace hopper_attention
