// What a caller may ask of a kernel: the key that finds a row of hopper/forward/instances.def.
#pragma once

namespace hopper_attention {

enum class Dtype : int { kFloat16 = 0, kBfloat16 = 1 };

// kFull: every query sees every key, and scores are used as they are.
// kMasked: causal masks, windows, soft caps and scales that are not positive, all at run time; so
// it can serve any request, and serves full ones where its tiles are faster (config.h's tile_mask).
enum class MaskKind : int { kFull = 0, kMasked = 1 };

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
  return dtype == Dtype::kFloat16 ? "float16" : "bfloat16";
}

constexpr const char* name_of(MaskKind mask) { return mask == MaskKind::kFull ? "full" : "masked"; }

struct HeadDims {
  int qk;
  int v;
};

// The head dimensions that kernels are compiled for, in the order in which a request tries them.
inline constexpr HeadDims kForwardHeadDims[] = {{64, 64},   {96, 96},   {128, 128},
                                                {192, 128}, {192, 192}, {256, 256}};

// The smallest compiled pair that holds (head_dim, head_dim_v); {0, 0} when none does.
constexpr HeadDims tile_head_dims(int head_dim, int head_dim_v) {
  for (const HeadDims& dims : kForwardHeadDims) {
    if (head_dim <= dims.qk && head_dim_v <= dims.v) return dims;
  }
  return {0, 0};
}

}  // namespace hopper_attention
