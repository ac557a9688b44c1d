#include "forward/descriptors.h"

#include "common/tensor_map.h"
#include "hopper_attention/budget.h"
#include "hopper_attention/fp8.h"

namespace hopper_attention {
namespace {

struct Map {
  const char* name;
  CUtensorMap* map;
  TensorView view;
  TensorBox box;
  TensorType type;
};

TensorType tensor_type(int dtype) {
  if (dtype == HOPPER_ATTENTION_E4M3) return TensorType::kByte;
  return dtype == HOPPER_ATTENTION_BFLOAT16 ? TensorType::kBfloat16 : TensorType::kFloat16;
}

}  // namespace

Status encode_descriptors(const hopper_attention_forward_args& a, const ForwardPlan& plan,
                          ForwardParams* params) {
  const TensorType type = tensor_type(a.dtype);
  const TensorType out_type = is_fp8(plan.key.dtype) ? tensor_type(a.out_dtype) : type;
  const bool keys = a.seqlen_k > 0;  // else K and V may be null and are never read: Q stands in
  const int seqlen_k = keys ? a.seqlen_k : 1;
  const int batch = a.packed ? 1 : a.batch;
  const int slab = slab_columns(plan.key.head_dim, bytes_of(type));
  const int slab_v = slab_columns(plan.key.head_dim_v, bytes_of(type));
  const int slab_out = slab_columns(plan.key.head_dim_v, kOutputBytes);

  TensorView v{keys ? a.v : a.q, a.head_dim_v,    seqlen_k,        a.heads_kv, batch,
               a.v_stride_seq,   a.v_stride_head, a.v_stride_batch};
  TensorBox v_box{slab_v, plan.config.tile_n};
  if (a.v_transposed) {
    v.head_dim = round_up(seqlen_k, kScaleTokens);
    v.seqlen = a.head_dim_v;
    v_box = {plan.config.tile_n, plan.key.head_dim_v};
  }
  const Map maps[] = {
      {"q",
       &params->q,
       {a.q, a.head_dim, a.seqlen_q, a.heads, batch, a.q_stride_seq, a.q_stride_head,
        a.q_stride_batch},
       {slab, kConsumerRows},
       type},
      {"k",
       &params->k,
       {keys ? a.k : a.q, a.head_dim, seqlen_k, a.heads_kv, batch, a.k_stride_seq, a.k_stride_head,
        a.k_stride_batch},
       {slab, plan.config.tile_n},
       type},
      {"v", &params->v, v, v_box, type},
      {"out",
       &params->out,
       {a.out, a.head_dim_v, a.seqlen_q, a.heads, batch, a.out_stride_seq, a.out_stride_head,
        a.out_stride_batch},
       {slab_out, kConsumerRows},
       out_type},
  };
  for (const Map& m : maps) {
    if (const char* error = encode_tensor_map(m.map, m.view, m.box, m.type)) {
      return {HOPPER_ATTENTION_CUDA_ERROR, std::string("descriptor of ") + m.name + ": " + error};
    }
  }
  return {};
}

}  // namespace hopper_attention
