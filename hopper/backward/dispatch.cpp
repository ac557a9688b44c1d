// The C interface of the backward pass: check -> plan -> find the compiled instance -> descriptors
// -> three launches, and one for the sinks' gradient.
#include <algorithm>
#include <string>

#include "backward/params.h"
#include "backward/problem.h"
#include "common/tensor_map.h"
#include "entry.h"
#include "hopper_attention/backward_budget.h"

namespace hopper_attention {

#define HOPPER_ATTENTION_BACKWARD(name, dtype, head_dim, head_dim_v, mask) \
  cudaError_t backward_##name(const BackwardParams&, const BackwardLaunchSpec&);
#include "compiled_backward_instances.def"
#undef HOPPER_ATTENTION_BACKWARD

namespace {

struct BackwardRow {
  const char* name;
  BackwardKey key;
  BackwardLauncher launch;  // null where this build left the row out
};

#define HOPPER_ATTENTION_BACKWARD(name, dtype, head_dim, head_dim_v, mask) \
  {"backward_" #name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}, &backward_##name},
constexpr BackwardRow kCompiledBackwardRows[] = {
#include "compiled_backward_instances.def"
    {"", {}, nullptr},  // a build may leave every row out
};
#undef HOPPER_ATTENTION_BACKWARD

#define HOPPER_ATTENTION_BACKWARD(name, dtype, head_dim, head_dim_v, mask) \
  {"backward_" #name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}, nullptr},
constexpr BackwardRow kAllBackwardRows[] = {
#include "backward/instances.def"
};
#undef HOPPER_ATTENTION_BACKWARD

template <std::size_t size>
const BackwardRow* find_row(const BackwardRow (&rows)[size], const BackwardKey& key) {
  for (const BackwardRow& row : rows) {
    if (row.key == key) return &row;
  }
  return nullptr;
}

Status missing_instance(const BackwardKey& key) {
  const BackwardRow* row = find_row(kAllBackwardRows, key);
  return {HOPPER_ATTENTION_NOT_COMPILED,
          std::string("this build leaves out the kernel ") + (row ? row->name : "?") +
              "; build with -DHOPPER_ATTENTION_INSTANCES=.* to have all of them"};
}

StridedTensor strided(const void* data, std::int64_t batch, std::int64_t seq, std::int64_t head) {
  return {const_cast<void*>(data), batch, seq, head};
}

// For a problem that has queries and keys.
Status encode_descriptors(const hopper_attention_backward_args& a, const BackwardPlan& plan,
                          BackwardParams* params) {
  const TensorType type =
      plan.key.dtype == Dtype::kBfloat16 ? TensorType::kBfloat16 : TensorType::kFloat16;
  const int slab_q = slab_columns(plan.key.head_dim, bytes_of(type));
  const int slab_k = key_slab_columns(plan.config);
  const int slab_v = slab_columns(plan.key.head_dim_v, bytes_of(type));
  const int tile_m = plan.config.tile_m, tile_n = plan.config.tile_n;
  const int s_q = a.seqlen_q, s_k = a.seqlen_k, h = a.heads, h_kv = a.heads_kv, b = a.batch;
  const int d = a.head_dim, d_v = a.head_dim_v;
  struct {
    const char* name;
    CUtensorMap* map;
    TensorView view;
    TensorBox box;
  } maps[] = {
      {"q",
       &params->q,
       {a.q, d, s_q, h, b, a.q_stride_seq, a.q_stride_head, a.q_stride_batch},
       {slab_q, tile_m}},
      {"dout",
       &params->dout,
       {a.dout, d_v, s_q, h, b, a.dout_stride_seq, a.dout_stride_head, a.dout_stride_batch},
       {slab_v, tile_m}},
      {"k",
       &params->k,
       {a.k, d, s_k, h_kv, b, a.k_stride_seq, a.k_stride_head, a.k_stride_batch},
       {slab_k, tile_n}},
      {"v",
       &params->v,
       {a.v, d_v, s_k, h_kv, b, a.v_stride_seq, a.v_stride_head, a.v_stride_batch},
       {slab_v, tile_n}},
      {"dk",
       &params->dk,
       {a.dk, d, s_k, h_kv, b, a.dk_stride_seq, a.dk_stride_head, a.dk_stride_batch},
       {slab_k, gradient_rows(plan.config)}},
      {"dv",
       &params->dv,
       {a.dv, d_v, s_k, h_kv, b, a.dv_stride_seq, a.dv_stride_head, a.dv_stride_batch},
       {slab_v, gradient_rows(plan.config)}},
  };
  const bool ragged = is_ragged(plan.config);
  for (const auto& m : maps) {
    if (const char* error =
            ragged ? encode_ragged_tensor_map(m.map, m.view, a.packed != 0, m.box, type)
                   : encode_tensor_map(m.map, m.view, m.box, type)) {
      return {HOPPER_ATTENTION_CUDA_ERROR, std::string("descriptor of ") + m.name + ": " + error};
    }
  }
  return {};
}

BackwardWorkspace place_workspace(const hopper_attention_backward_args& args,
                                  const BackwardPlan& plan) {
  const bool deterministic = args.deterministic != 0;
  const WorkspaceLayout layout = workspace_layout(plan, args.packed != 0, deterministic);
  char* base = static_cast<char*>(args.workspace);
  return {reinterpret_cast<float*>(base), reinterpret_cast<float*>(base + layout.lse_log2),
          reinterpret_cast<float*>(base + layout.delta),
          deterministic ? reinterpret_cast<unsigned int*>(base + layout.turns) : nullptr,
          is_persistent(plan.config) ? reinterpret_cast<unsigned int*>(base + layout.tickets)
                                     : nullptr};
}

PackedLengths packed_lengths(const hopper_attention_backward_args& a) {
  return {a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q, a.seqused_k,
          a.batch,        a.seqlen_q,     a.seqlen_k};
}

// No entries where the batch is dense.
KeyList place_key_list(const hopper_attention_backward_args& args, const BackwardPlan& plan) {
  if (!args.packed) return {};
  const WorkspaceLayout layout = workspace_layout(plan, true, args.deterministic != 0);
  auto* const header =
      reinterpret_cast<KeyListHeader*>(static_cast<char*>(args.workspace) + layout.key_list);
  return {packed_lengths(args), plan.packed_order, header, reinterpret_cast<KeyEntry*>(header + 1),
          plan.max_key_entries};
}

QueryGrid query_grid(const hopper_attention_backward_args& args, const BackwardPlan& plan) {
  const bool packed = args.packed != 0;
  return {args.seqlen_q,
          args.heads,
          packed ? 1 : args.batch,
          plan.num_m_blocks,
          plan.config.tile_m,
          packed,
          packed ? packed_lengths(args) : PackedLengths{}};
}

Status run_main(const hopper_attention_backward_args& args, const BackwardPlan& plan,
                const BackwardWorkspace& workspace, const BackwardRow& row, int device,
                int num_sms) {
  BackwardParams params;
  if (Status status = encode_descriptors(args, plan, &params); !status.ok()) return status;
  params.workspace = workspace;
  params.mask = plan.mask;
  params.order = plan.order;
  params.num_m_blocks = plan.num_m_blocks;
  params.heads_per_kv = args.heads / args.heads_kv;
  params.descending = plan.descending;
  params.last_first = plan.last_first;
  params.scale_log2 = plan.scale_log2;
  params.softmax_scale = args.softmax_scale;
  params.cap_log2 = plan.cap_log2;
  params.inner_scale = plan.inner_scale;
  params.list = place_key_list(args, plan);
  const int grid = is_persistent(plan.config) ? std::min(plan.key_grid, num_sms) : plan.key_grid;
  const BackwardLaunchSpec spec{grid, device, static_cast<cudaStream_t>(args.stream)};
  const cudaError_t error = row.launch(params, spec);
  return error == cudaSuccess ? Status{} : cuda_failure(row.name, error);
}

Status run_preprocess(const hopper_attention_backward_args& a, const BackwardPlan& plan,
                      const BackwardWorkspace& workspace) {
  PreprocessParams params;
  params.out = strided(a.out, a.out_stride_batch, a.out_stride_seq, a.out_stride_head);
  params.dout = strided(a.dout, a.dout_stride_batch, a.dout_stride_seq, a.dout_stride_head);
  params.lse = a.lse;
  params.dlse = a.dlse;
  params.workspace = workspace;
  params.dq_layout = plan.dq_layout;
  params.queries = query_grid(a, plan);
  params.head_dim_v = a.head_dim_v;
  params.bfloat16 = plan.key.dtype == Dtype::kBfloat16;
  params.list = place_key_list(a, plan);
  params.mask = plan.mask;
  params.entry_keys = cluster_keys(plan.config);
  const cudaError_t error = launch_preprocess(params, static_cast<cudaStream_t>(a.stream));
  return error == cudaSuccess ? Status{} : cuda_failure("preprocess", error);
}

Status run_convert(const hopper_attention_backward_args& a, const BackwardPlan& plan,
                   const BackwardWorkspace& workspace) {
  ConvertParams params;
  params.dq = strided(a.dq, a.dq_stride_batch, a.dq_stride_seq, a.dq_stride_head);
  params.accumulator = workspace.dq;
  params.dq_layout = plan.dq_layout;
  params.queries = query_grid(a, plan);
  params.head_dim = a.head_dim;
  params.scale = a.softmax_scale;
  params.bfloat16 = plan.key.dtype == Dtype::kBfloat16;
  const cudaError_t error = launch_convert(params, static_cast<cudaStream_t>(a.stream));
  return error == cudaSuccess ? Status{} : cuda_failure("convert", error);
}

Status run_sink(const hopper_attention_backward_args& a, const BackwardPlan& plan,
                const BackwardWorkspace& workspace) {
  if (a.dsink == nullptr) return {};
  const int padded_rows = plan.num_m_blocks * plan.config.tile_m;
  // Of a packed batch all blocks: their rows that do not ask have no P.
  const int rows = a.packed ? padded_rows : a.seqlen_q, batch = a.packed ? 1 : a.batch;
  const SinkParams params{a.sink, workspace.lse_log2, workspace.delta, a.dsink,
                          rows,   padded_rows,        a.heads,         batch};
  const cudaError_t error = launch_sink(params, static_cast<cudaStream_t>(a.stream));
  return error == cudaSuccess ? Status{} : cuda_failure("sink", error);
}

Status zero_key_gradients(const hopper_attention_backward_args& a) {
  const StridedTensor dk = strided(a.dk, a.dk_stride_batch, a.dk_stride_seq, a.dk_stride_head);
  const StridedTensor dv = strided(a.dv, a.dv_stride_batch, a.dv_stride_seq, a.dv_stride_head);
  const auto stream = static_cast<cudaStream_t>(a.stream);
  const int batch = a.packed ? 1 : a.batch;
  cudaError_t error = launch_zero(dk, batch, a.seqlen_k, a.heads_kv, a.head_dim, stream);
  if (error == cudaSuccess) {
    error = launch_zero(dv, batch, a.seqlen_k, a.heads_kv, a.head_dim_v, stream);
  }
  return error == cudaSuccess ? Status{} : cuda_failure("zero", error);
}

Status backward(const hopper_attention_backward_args& args) {
  if (Status status = check_backward_shape(args); !status.ok()) return status;
  int device = 0, num_sms = 0;
  if (Status status = current_device(&device, &num_sms); !status.ok()) return status;
  if (Status status = check_backward_tensors(args); !status.ok()) return status;
  BackwardPlan plan;
  if (Status status = plan_backward(args, &plan); !status.ok()) return status;
  const BackwardRow* row = find_row(kCompiledBackwardRows, plan.key);
  if (row == nullptr) return missing_instance(plan.key);

  // Without queries dK, dV and dSink are 0, without keys dQ is.
  if (plan.query_grid == 0) {
    if (Status status = run_sink(args, plan, {}); !status.ok()) return status;
    return zero_key_gradients(args);
  }
  const BackwardWorkspace workspace = place_workspace(args, plan);
  if (Status status = run_preprocess(args, plan, workspace); !status.ok()) return status;
  if (Status status = run_sink(args, plan, workspace); !status.ok()) return status;
  if (plan.key_grid > 0) {
    if (Status status = run_main(args, plan, workspace, *row, device, num_sms); !status.ok())
      return status;
  }
  return run_convert(args, plan, workspace);
}

Status workspace_bytes(const hopper_attention_backward_args& args, std::uint64_t* bytes) {
  if (Status status = check_backward_shape(args); !status.ok()) return status;
  BackwardPlan plan;
  if (Status status = plan_backward(args, &plan); !status.ok()) return status;
  *bytes = workspace_layout(plan, args.packed != 0, args.deterministic != 0).bytes;
  return {};
}

}  // namespace
}  // namespace hopper_attention

using namespace hopper_attention;

extern "C" {

hopper_attention_status hopper_attention_backward(const hopper_attention_backward_args* args) {
  return guarded(args, [](const auto& known) { return backward(known); });
}

hopper_attention_status hopper_attention_backward_workspace_bytes(
    const hopper_attention_backward_args* args, uint64_t* bytes) {
  return guarded(args, [&](const auto& known) {
    if (bytes == nullptr) return Status::invalid("bytes is null");
    return workspace_bytes(known, bytes);
  });
}

const char* hopper_attention_backward_instances(void) {
  static const std::string names = [] {
    std::string joined;
    for (const BackwardRow& row : kCompiledBackwardRows) {
      if (row.launch != nullptr) joined += std::string(row.name) + "\n";
    }
    return joined;
  }();
  return names.c_str();
}

}  // extern "C"
