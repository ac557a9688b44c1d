// The C interface: check -> plan -> find the compiled instance -> descriptors -> launch.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "entry.h"
#include "forward/descriptors.h"
#include "forward/params.h"
#include "forward/problem.h"
#include "hopper_attention/budget.h"

namespace hopper_attention {

#define HOPPER_ATTENTION_FORWARD(name, dtype, head_dim, head_dim_v, mask) \
  cudaError_t forward_##name(const ForwardParams&, const LaunchSpec&);
#include "compiled_instances.def"
#undef HOPPER_ATTENTION_FORWARD

namespace {

struct ForwardRow {
  const char* name;
  ForwardKey key;
  ForwardLauncher launch;  // null where this build left the row out
};

#define HOPPER_ATTENTION_FORWARD(name, dtype, head_dim, head_dim_v, mask) \
  {#name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}, &forward_##name},
constexpr ForwardRow kCompiledRows[] = {
#include "compiled_instances.def"
    {"", {}, nullptr},  // a build may leave every row out
};
#undef HOPPER_ATTENTION_FORWARD

#define HOPPER_ATTENTION_FORWARD(name, dtype, head_dim, head_dim_v, mask) \
  {#name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}, nullptr},
constexpr ForwardRow kAllRows[] = {
#include "forward/instances.def"
};
#undef HOPPER_ATTENTION_FORWARD

template <std::size_t size>
const ForwardRow* find_row(const ForwardRow (&rows)[size], const ForwardKey& key) {
  for (const ForwardRow& row : rows) {
    if (row.key == key) return &row;
  }
  return nullptr;
}

constexpr int kDefaultSms = 132;

Status missing_instance(const ForwardKey& key) {
  const ForwardRow* row = find_row(kAllRows, key);
  return {HOPPER_ATTENTION_NOT_COMPILED,
          std::string("this build leaves out the kernel ") + (row ? row->name : "?") +
              "; build with -DHOPPER_ATTENTION_INSTANCES=.* to have all of them"};
}

PackedParams packed_params(const hopper_attention_forward_args& args, const ForwardPlan& plan) {
  const PackedStart start = make_packed_start(plan.packed_order, plan.grid, args.batch);
  auto* const header = static_cast<PackedHeader*>(args.workspace);
  return {{args.cu_seqlens_q, args.cu_seqlens_k, args.seqused_q, args.seqused_k, args.batch,
           args.seqlen_q, args.seqlen_k},
          plan.packed_order,
          make_packed_divides(plan.packed_order, args.heads / args.heads_kv),
          start,
          header,
          reinterpret_cast<TileEntry*>(header + 1),
          plan.num_tiles / args.heads + start.entries,
          args.out,
          args.out_stride_seq,
          args.out_stride_head};
}

Status forward(const hopper_attention_forward_args& args) {
  if (Status status = check_forward_shape(args); !status.ok()) return status;
  int device = 0, num_sms = 0;
  if (Status status = current_device(&device, &num_sms); !status.ok()) return status;
  const bool no_rows = args.seqlen_q == 0 || (args.batch == 0 && !args.packed);
  if (args.heads == 0 || no_rows) return {};  // nothing to write
  if (Status status = check_forward_tensors(args); !status.ok()) return status;
  ForwardPlan plan;
  if (Status status = plan_forward(args, num_sms, &plan); !status.ok()) return status;
  const ForwardRow* row = find_row(kCompiledRows, plan.key);
  if (row == nullptr) return missing_instance(plan.key);

  ForwardParams params;
  if (Status status = encode_descriptors(args, plan, &params); !status.ok()) return status;
  params.lse = args.lse;
  params.sink = args.sink;
  params.counters = static_cast<unsigned int*>(args.workspace);
  params.mask = plan.mask;
  params.order = plan.order;
  params.cluster = plan.cluster;
  params.heads_per_kv = args.heads / args.heads_kv;
  params.scale_log2 = plan.scale_log2;
  params.transform_scores = plan.transform_scores;
  params.inner_scale = plan.inner_scale;
  params.cap = plan.cap;
  params.scales = plan.scales;
  params.head_dim_v = args.head_dim_v;
  params.v_transposed = args.v_transposed != 0;
  params.out_float16 = args.out_dtype == HOPPER_ATTENTION_FLOAT16;
  const LaunchSpec spec{plan.grid, device, static_cast<cudaStream_t>(args.stream)};
  if (args.packed) {
    params.packed = packed_params(args, plan);
    const cudaError_t error = launch_list_tiles(params.packed, params.mask, plan.config.tile_m(),
                                                plan.config.tile_n, spec.stream);
    if (error != cudaSuccess) return cuda_failure("list_tiles", error);
  }
  const cudaError_t error = row->launch(params, spec);
  return error == cudaSuccess ? Status{} : cuda_failure(row->name, error);
}

Status explain(const hopper_attention_forward_args& args, char* buffer, std::size_t capacity) {
  if (Status status = check_forward_shape(args); !status.ok()) return status;
  int device = 0, num_sms = 0;
  if (!current_device(&device, &num_sms).ok()) num_sms = kDefaultSms;
  ForwardPlan plan;
  if (Status status = plan_forward(args, num_sms, &plan); !status.ok()) return status;
  const ForwardRow* row = find_row(kAllRows, plan.key);
  const bool full = plan.key.mask == MaskKind::kFull;
  std::snprintf(
      buffer, capacity,
      "{\"instance\": \"%s\", \"dtype\": \"%s\", \"mask\": \"%s\", \"tile_m\": %d, \"tile_n\": %d, "
      "\"stages\": %d, \"num_consumers\": %d, \"cluster\": %d, \"head_dim_tile\": %d, "
      "\"head_dim_v_tile\": %d, "
      "\"smem_bytes\": %d, \"grid\": %d, \"num_tiles\": %d, \"scheduler\": \"%s\", "
      "\"compiled\": %s, \"reason\": \"%s\"}",
      row ? row->name : "", name_of(plan.key.dtype), name_of(plan.key.mask), plan.config.tile_m(),
      plan.config.tile_n, plan.config.stages, plan.config.num_consumers, plan.cluster,
      plan.key.head_dim, plan.key.head_dim_v, shared_bytes(plan.config), plan.grid, plan.num_tiles,
      full ? "static" : "dynamic", find_row(kCompiledRows, plan.key) ? "true" : "false",
      plan.config.reason);
  return {};
}

}  // namespace
}  // namespace hopper_attention

using namespace hopper_attention;

extern "C" {

hopper_attention_status hopper_attention_forward(const hopper_attention_forward_args* args) {
  return guarded(args, [](const auto& known) { return forward(known); });
}

size_t hopper_attention_forward_workspace_bytes(void) { return 2 * sizeof(unsigned int); }

size_t hopper_attention_packed_workspace_bytes(int32_t total_q, int32_t batch) {
  return total_q < 0 || batch < 0 ? 0 : packed_workspace_bytes(total_q, batch);
}

hopper_attention_status hopper_attention_explain_forward(const hopper_attention_forward_args* args,
                                                         char* buffer, size_t capacity) {
  return guarded(args, [&](const auto& known) {
    if (buffer == nullptr || capacity == 0) return Status::invalid("buffer is null or empty");
    return explain(known, buffer, capacity);
  });
}

const char* hopper_attention_version(void) { return HOPPER_ATTENTION_VERSION; }

const char* hopper_attention_instances(void) {
  static const std::string names = [] {
    std::string joined;
    for (const ForwardRow& row : kCompiledRows) {
      if (row.launch != nullptr) joined += std::string(row.name) + "\n";
    }
    return joined;
  }();
  return names.c_str();
}

}  // extern "C"
