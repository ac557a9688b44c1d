// The quantizer's entry points: check -> plan -> descriptors -> kernels.
#include <algorithm>

#include "common/tensor_map.h"
#include "entry.h"
#include "quantize/launch.h"
#include "quantize/problem.h"

namespace hopper_attention {
namespace {

struct View {
  void* data;
  std::int64_t stride_batch, stride_seq, stride_head;
};

// One of q, k and v, of elements of this type.
const char* encode(CUtensorMap* map, const QuantizeTensor& t, const View& view, int head_dim,
                   TensorBox box, TensorType type) {
  const bool packed = t.cu_seqlens != nullptr;
  const TensorView whole{
      view.data,       head_dim,         t.seqlen,         t.heads, packed ? 1 : t.batch,
      view.stride_seq, view.stride_head, view.stride_batch};
  return encode_tensor_map(map, whole, box, type);
}

Status encode_maps(const QuantizePlan& plan, bool bfloat16, QuantizeMaps* maps) {
  const char* names[] = {"v", "q", "k"};
  const QuantizeGeometry geometry = quantize_geometry(plan.tile);
  for (int which : {kV, kQ, kK}) {
    const QuantizeTensor& t = plan.params.tensors[which];
    if (t.order.num_tiles == 0 || t.seqlen == 0) continue;
    const char* error = nullptr;
    if (t.aligned) {
      const View in{const_cast<void*>(t.in), t.in_stride_batch, t.in_stride_seq, t.in_stride_head};
      error = encode(&maps->in[which], t, in, t.head_dim, {64, kQuantizeTokens},
                     bfloat16 ? TensorType::kBfloat16 : TensorType::kFloat16);
    }
    if (error == nullptr && !(which == kV && plan.params.v_transposed)) {
      // Rows are written up to the next multiple of 16 elements.
      const View out{t.out, t.out_stride_batch, t.out_stride_seq, t.out_stride_head};
      error = encode(&maps->out[which], t, out, static_cast<int>(round_up(t.head_dim, 16)),
                     {plan.tile < 128 ? plan.tile : 128, geometry.rows_of_warp}, TensorType::kByte);
    }
    if (error != nullptr) {
      return {HOPPER_ATTENTION_CUDA_ERROR,
              std::string("quantizer's descriptor of ") + names[which] + ": " + error};
    }
  }
  return {};
}

Status quantize(const hopper_attention_quantize_args& args) {
  if (Status status = check_quantize_shape(args); !status.ok()) return status;
  int device = 0, num_sms = 0;
  if (Status status = current_device(&device, &num_sms); !status.ok()) return status;
  if (args.batch == 0 || (args.heads == 0 && args.heads_kv == 0)) return {};  // nothing to write
  if (Status status = check_quantize_tensors(args); !status.ok()) return status;
  QuantizePlan plan;
  if (Status status = plan_quantize(args, &plan); !status.ok()) return status;
  const QuantizeGeometry geometry = quantize_geometry(plan.tile);
  const int max_blocks = std::min(kMaxQuantizeBlocks, num_sms * geometry.blocks_per_sm);
  schedule_quantize({max_blocks, geometry.teams, geometry.stages}, &plan);
  const QuantizeLaunch launch{plan.tile, args.dtype == HOPPER_ATTENTION_BFLOAT16, device,
                              max_blocks, static_cast<cudaStream_t>(args.stream)};
  QuantizeMaps maps{};
  if (Status status = encode_maps(plan, launch.bfloat16, &maps); !status.ok()) return status;
  cudaError_t error = launch_preparation(plan.params, launch);
  if (error == cudaSuccess) error = launch_quantize(plan.params, maps, launch);
  return error == cudaSuccess ? Status{} : cuda_failure("quantize", error);
}

}  // namespace
}  // namespace hopper_attention

using namespace hopper_attention;

extern "C" {

hopper_attention_status hopper_attention_quantize(const hopper_attention_quantize_args* args) {
  return guarded(args, [](const auto& known) { return quantize(known); });
}

size_t hopper_attention_quantize_workspace_bytes(const hopper_attention_quantize_args* args) {
  size_t bytes = 0;
  guarded(args, [&](const auto& known) {
    Status status = check_quantize_shape(known);
    if (status.ok()) bytes = 4 * static_cast<size_t>(quantize_workspace(known).words);
    return status;
  });
  return bytes;
}

}  // extern "C"
