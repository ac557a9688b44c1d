// The quantizer's entry points: check -> plan -> memset, first pass, (K's mean,) second pass.
#include "entry.h"
#include "quantize/launch.h"
#include "quantize/problem.h"

namespace hopper_attention {
namespace {

// Runs the first pass over those tensors that it has something to find in.
cudaError_t find_stats(const QuantizeParams& all, const QuantizeLaunch& launch) {
  QuantizeParams params = all;
  for (int which : {kV, kQ, kK}) {
    QuantizeTensor& tensor = params.tensors[which];
    const bool sums = which == kK && params.sum_k;
    if (!tensor.find_amax && !sums) {
      params.num_tasks -= tensor.num_tasks;
      tensor.num_tasks = 0;
    }
  }
  return launch_quantize_stats(params, launch);
}

cudaError_t run(const QuantizePlan& plan, const QuantizeLaunch& launch, void* workspace) {
  QuantizeParams params = plan.params;
  const bool smooth = params.k_mean != nullptr && params.tensors[kK].num_tasks > 0;
  cudaError_t error = cudaMemsetAsync(
      workspace, 0, plan.workspace.amax_words * sizeof(std::uint32_t), launch.stream);
  if (error != cudaSuccess) return error;

  params.sum_k = smooth;
  if (plan.second_amax) params.tensors[kK].find_amax = false;
  error = find_stats(params, launch);
  if (error != cudaSuccess) return error;
  params.sum_k = false;
  params.subtract_k_mean = smooth;
  if (smooth) error = launch_quantize_mean(params, launch);
  if (error != cudaSuccess) return error;
  if (smooth && plan.second_amax) {
    QuantizeParams again = params;
    again.tensors[kK].find_amax = true;
    again.tensors[kV].find_amax = again.tensors[kQ].find_amax = false;
    error = find_stats(again, launch);
    if (error != cudaSuccess) return error;
  }
  return launch_quantize(params, launch);
}

Status quantize(const hopper_attention_quantize_args& args) {
  if (Status status = check_quantize_shape(args); !status.ok()) return status;
  int device = 0, num_sms = 0;
  if (Status status = current_device(&device, &num_sms); !status.ok()) return status;
  if (args.batch == 0 || (args.heads == 0 && args.heads_kv == 0)) return {};  // nothing to write
  if (Status status = check_quantize_tensors(args); !status.ok()) return status;
  QuantizePlan plan;
  if (Status status = plan_quantize(args, &plan); !status.ok()) return status;
  const QuantizeLaunch launch{plan.tile, args.dtype == HOPPER_ATTENTION_BFLOAT16, device, num_sms,
                              static_cast<cudaStream_t>(args.stream)};
  const cudaError_t error = run(plan, launch, args.workspace);
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
