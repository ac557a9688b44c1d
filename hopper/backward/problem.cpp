#include "backward/problem.h"

#include <climits>

#include "forward/problem.h"
#include "hopper_attention/backward_budget.h"

namespace hopper_attention {
namespace {

constexpr float kLog2E = 1.442695040888963407f;
constexpr std::uint64_t kWorkspaceAlignment = 128;
// Two waves of an H100's or H200's 132 blocks: the last group's longest blocks start late, and with
// fewer there is nothing left to fill in beside them (8k tokens, GQA 16/4: 20%).
constexpr int kMinGroupBlocks = 256;
constexpr int kMinOrderedHeads = 4;

struct TensorField {
  const char* name;
  const void* data;
  std::int64_t strides[3];  // batch, seq, head
  int sizes[3];
};

Status check_tensor(const TensorField& tensor) {
  static constexpr const char* kDims[] = {"batch", "seq", "head"};
  for (int size : tensor.sizes) {
    if (size == 0) return {};  // never touched
  }
  const std::string name = tensor.name;
  if (tensor.data == nullptr) return Status::invalid(name + " is null");
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % 16 != 0) {
    return Status::invalid(name + " is not aligned to 16 bytes");
  }
  for (int i = 0; i < 3; ++i) {
    const std::int64_t stride = tensor.strides[i];
    if (tensor.sizes[i] == 1) continue;  // never taken
    if (stride % 8 != 0 || stride < 0 || stride >= (1ll << 39)) {
      return Status::invalid(name + "_stride_" + kDims[i] + " is " + std::to_string(stride) +
                             "; allowed are multiples of 8 elements (16 bytes) from 0 to 2^39");
    }
  }
  return {};
}

Status check_vector(const char* name, const void* data) {
  if (reinterpret_cast<std::uintptr_t>(data) % 4 == 0) return {};
  return Status::invalid(std::string(name) + " is not aligned to 4 bytes");
}

std::uint64_t align(std::uint64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Of one sequence, or at most of a packed batch.
std::int64_t count_blocks(const hopper_attention_backward_args& args, int length, int tile) {
  if (args.packed) return length > 0 ? max_blocks(length, args.batch, tile) : 0;
  return (static_cast<std::int64_t>(length) + tile - 1) / tile;
}

// The fields of a forward call that a backward call has too.
hopper_attention_forward_args shared_fields(const hopper_attention_backward_args& args) {
  hopper_attention_forward_args forward{};
  forward.dtype = args.dtype;
  forward.batch = args.batch;
  forward.seqlen_q = args.seqlen_q;
  forward.seqlen_k = args.seqlen_k;
  forward.heads = args.heads;
  forward.heads_kv = args.heads_kv;
  forward.head_dim = args.head_dim;
  forward.head_dim_v = args.head_dim_v;
  forward.softmax_scale = args.softmax_scale;
  forward.softcap = args.softcap;
  forward.causal = args.causal;
  forward.window_left = args.window_left;
  forward.window_right = args.window_right;
  forward.packed = args.packed;
  forward.cu_seqlens_q = args.cu_seqlens_q;
  forward.cu_seqlens_k = args.cu_seqlens_k;
  forward.seqused_q = args.seqused_q;
  forward.seqused_k = args.seqused_k;
  return forward;
}

}  // namespace

Status check_backward_shape(const hopper_attention_backward_args& args) {
  if (args.dtype != HOPPER_ATTENTION_FLOAT16 && args.dtype != HOPPER_ATTENTION_BFLOAT16) {
    return Status::invalid("dtype is " + std::to_string(args.dtype) +
                           "; allowed are 0 (float16) and 1 (bfloat16)");
  }
  if (args.deterministic != 0 && args.deterministic != 1) {
    return Status::invalid("deterministic is " + std::to_string(args.deterministic) +
                           "; allowed are 0 and 1");
  }
  return check_forward_shape(shared_fields(args));
}

Status check_backward_tensors(const hopper_attention_backward_args& a) {
  const int b = a.packed ? 1 : a.batch, s_q = a.seqlen_q, s_k = a.seqlen_k, h = a.heads,
            h_kv = a.heads_kv;
  const TensorField tensors[] = {
      {"q", a.q, {a.q_stride_batch, a.q_stride_seq, a.q_stride_head}, {b, s_q, h}},
      {"k", a.k, {a.k_stride_batch, a.k_stride_seq, a.k_stride_head}, {b, s_k, h_kv}},
      {"v", a.v, {a.v_stride_batch, a.v_stride_seq, a.v_stride_head}, {b, s_k, h_kv}},
      {"out", a.out, {a.out_stride_batch, a.out_stride_seq, a.out_stride_head}, {b, s_q, h}},
      {"dout", a.dout, {a.dout_stride_batch, a.dout_stride_seq, a.dout_stride_head}, {b, s_q, h}},
      {"dq", a.dq, {a.dq_stride_batch, a.dq_stride_seq, a.dq_stride_head}, {b, s_q, h}},
      {"dk", a.dk, {a.dk_stride_batch, a.dk_stride_seq, a.dk_stride_head}, {b, s_k, h_kv}},
      {"dv", a.dv, {a.dv_stride_batch, a.dv_stride_seq, a.dv_stride_head}, {b, s_k, h_kv}}};
  for (const TensorField& tensor : tensors) {
    if (Status status = check_tensor(tensor); !status.ok()) return status;
  }
  const bool rows = b > 0 && s_q > 0 && h > 0;
  if (rows && a.lse == nullptr) return Status::invalid("lse is null");
  if (Status status = check_vector("lse", a.lse); !status.ok()) return status;
  if (Status status = check_vector("dlse", a.dlse); !status.ok()) return status;
  if (Status status = check_vector("sink", a.sink); !status.ok()) return status;
  if (Status status = check_vector("dsink", a.dsink); !status.ok()) return status;
  if (a.dsink != nullptr && a.sink == nullptr) {
    return Status::invalid("sink is null, but dsink, its gradient, is not");
  }
  const bool aligned = reinterpret_cast<std::uintptr_t>(a.workspace) % kWorkspaceAlignment == 0;
  if (rows && (a.workspace == nullptr || !aligned)) {
    return Status::invalid("workspace is null or not aligned to 128 bytes");
  }
  return a.packed ? check_packed_tensors(shared_fields(a)) : Status{};
}

// In which order key blocks run. n_blocks: of a KV head; tile_head_dim: dQ's.
static void plan_order(const hopper_attention_backward_args& args, int batch, std::int64_t n_blocks,
                       int tile_head_dim, BackwardPlan* plan) {
  // What the blocks of one KV head stream: Q and dO of its group, and dQ's accumulator.
  const int group = args.heads_kv > 0 ? args.heads / args.heads_kv : 1;
  const std::int64_t query_bytes = static_cast<std::int64_t>(group) *
                                   (2 * (args.head_dim + args.head_dim_v) + 4 * tile_head_dim);
  // Adds in a fixed order form a chain from key block to key block. Without a mask all blocks of a
  // head start at the same query block, and several heads in turn are that many chains, each the
  // shorter. With one, blocks start on their own diagonal in the order of the turns, from the last
  // key block to the first, so shortest first: the next head's short ones fill the gaps, and heads
  // that L2 does not hold cost more than the chain. But in a group of query heads the shorter
  // blocks run ahead into the next head, out of L2's reach. So groups descend through the query
  // blocks together, in the order that is longest first. Packed batches have a list, which gives a
  // sequence's blocks from the last to the first.
  const bool ordered = args.deterministic != 0;
  const bool masked = plan->key.mask != MaskKind::kFull;
  plan->descending = ordered && masked && group > 1 && !args.packed;
  plan->last_first = ordered && masked && !plan->descending;
  const std::int64_t blocks_per_head = n_blocks > 0 ? n_blocks : 1;
  const std::int64_t for_tail = (kMinGroupBlocks + blocks_per_head - 1) / blocks_per_head;
  std::int64_t min_group = for_tail;
  if (ordered && !masked) min_group = for_tail > kMinOrderedHeads ? for_tail : kMinOrderedHeads;
  if (plan->last_first) min_group = 1;
  plan->order = make_tile_order(args.seqlen_k, args.heads_kv, batch, cluster_keys(plan->config),
                                masked || ordered, args.seqlen_q * query_bytes, 1, min_group);
  if (args.packed && args.heads > 0) {
    plan->packed_order = make_key_order(args.seqlen_q, n_blocks, args.heads_kv, query_bytes,
                                        kMinGroupBlocks, ordered ? kMinOrderedHeads : 1);
  }
}

Status plan_backward(const hopper_attention_backward_args& args, BackwardPlan* plan) {
  plan->mask = make_mask(args.seqlen_q, args.seqlen_k, args.causal != 0, args.window_left,
                         args.window_right);
  const bool capped = args.softcap > 0.0f;
  plan->scale_log2 = args.softmax_scale * kLog2E;
  plan->cap_log2 = capped ? args.softcap * kLog2E : 0.0f;
  plan->inner_scale = capped ? args.softmax_scale / args.softcap : 0.0f;

  const HeadDims dims =
      tile_head_dims(static_cast<Dtype>(args.dtype), args.head_dim, args.head_dim_v);
  plan->key = {static_cast<Dtype>(args.dtype), dims.qk, dims.v,
               capped              ? MaskKind::kCapped
               : args.packed       ? MaskKind::kPacked
               : plan->mask.full() ? MaskKind::kFull
                                   : MaskKind::kMasked};
  plan->config = make_backward_config(plan->key);
  plan->dq_layout = make_dq_layout(plan->config);

  const std::int64_t m_blocks = count_blocks(args, args.seqlen_q, plan->config.tile_m);
  // Clusters are whole: the last one may have a block without keys.
  const std::int64_t clusters = count_blocks(args, args.seqlen_k, cluster_keys(plan->config));
  const std::int64_t n_blocks = clusters * cluster_blocks(plan->config);
  const int batch = args.packed ? 1 : args.batch;
  const double query_blocks = static_cast<double>(m_blocks) * args.heads * batch;
  const double key_blocks = static_cast<double>(n_blocks) * args.heads_kv * batch;
  const double padded_rows = static_cast<double>(m_blocks) * plan->config.tile_m;
  if (query_blocks >= INT_MAX || key_blocks >= INT_MAX || padded_rows >= INT_MAX) {
    return Status::invalid("batch x heads x seqlen is too large: more than 2^31 tiles of " +
                           std::to_string(plan->config.tile_m) + " queries or " +
                           std::to_string(plan->config.tile_n) + " keys");
  }
  plan->num_m_blocks = static_cast<int>(m_blocks);
  plan->max_key_entries = static_cast<int>(clusters);
  plan->query_grid = plan->num_m_blocks * args.heads * batch;
  plan->key_grid = static_cast<int>(n_blocks) * args.heads_kv * batch;
  plan_order(args, batch, n_blocks, dims.qk, plan);
  return {};
}

WorkspaceLayout workspace_layout(const BackwardPlan& plan, bool packed, bool deterministic) {
  const std::uint64_t blocks = static_cast<std::uint64_t>(plan.query_grid);
  const std::uint64_t rows = blocks * plan.config.tile_m;
  WorkspaceLayout layout{};
  layout.lse_log2 = align(blocks * plan.dq_layout.elements() * sizeof(float));
  layout.delta = layout.lse_log2 + align(rows * sizeof(float));
  layout.turns = layout.delta + align(rows * sizeof(float));
  layout.tickets = layout.turns;
  if (deterministic) layout.tickets += align(blocks * sizeof(unsigned int));
  layout.key_list = layout.tickets;
  if (is_persistent(plan.config) && blocks > 0) layout.key_list += align(sizeof(unsigned int));
  layout.bytes = layout.key_list + (packed ? align(key_list_bytes(plan.max_key_entries)) : 0);
  return layout;
}

}  // namespace hopper_attention
