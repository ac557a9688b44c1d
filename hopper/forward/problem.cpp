#include "forward/problem.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>

#include "hopper_attention/budget.h"

namespace hopper_attention {
namespace {

constexpr float kLog2E = 1.442695040888963407f;

std::string show(const char* name, long long value) {
  return std::string(name) + " is " + std::to_string(value);
}

struct Field {
  const char* name;
  long long value;
  long long low;
  long long high;
};

struct TensorField {
  const char* name;
  const void* data;
  struct {
    const char* name;
    std::int64_t stride;
    int size;
  } dims[3];
};

// granule: elements of 16 bytes.
Status check_tensor(const TensorField& tensor, int granule) {
  if (tensor.data == nullptr) return Status::invalid(std::string(tensor.name) + " is null");
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % 16 != 0) {
    return Status::invalid(std::string(tensor.name) + " is not aligned to 16 bytes");
  }
  for (const auto& dim : tensor.dims) {
    const bool used = dim.size > 1;  // the stride of a dimension of size 1 is never taken
    if (used && (dim.stride % granule != 0 || dim.stride < 0 || dim.stride >= (1ll << 39))) {
      return Status::invalid(
          show((std::string(tensor.name) + "_stride_" + dim.name).c_str(), dim.stride) +
          "; allowed are multiples of " + std::to_string(granule) +
          " elements (16 bytes) from 0 to 2^39");
    }
  }
  return {};
}

// The fields that only e4m3 has.
Status check_fp8_fields(const hopper_attention_forward_args& a) {
  if (a.dtype != HOPPER_ATTENTION_E4M3) {
    const bool used = a.out_dtype != 0 || a.accumulation != 0 || a.v_transposed != 0 ||
                      a.q_descale != nullptr || a.k_descale != nullptr || a.v_descale != nullptr ||
                      a.v_token_factor != nullptr;
    if (!used) return {};
    return Status::invalid(show("dtype", a.dtype) +
                           "; out_dtype, accumulation, v_transposed and scales are for e4m3 alone");
  }
  const Field fields[] = {{"out_dtype", a.out_dtype, 0, 1},
                          {"accumulation", a.accumulation, 0, 1},
                          {"v_transposed", a.v_transposed, 0, 1},
                          {"q_descale_per_kv", a.q_descale_per_kv, 0, 1},
                          {"v_descale_stride_channel", a.v_descale_stride_channel, 0, 1}};
  for (const Field& field : fields) {
    if (field.value < field.low || field.value > field.high) {
      return Status::invalid(show(field.name, field.value) + "; allowed are " +
                             std::to_string(field.low) + " and " + std::to_string(field.high));
    }
  }
  const Field tokens[] = {{"q_descale_tokens", a.q_descale_tokens, 0, 0},
                          {"k_descale_tokens", a.k_descale_tokens, 0, 0}};
  for (const Field& field : tokens) {
    if (field.value != 0 && field.value != 1 && field.value != kScaleTokens) {
      return Status::invalid(show(field.name, field.value) +
                             "; allowed are 0 (the whole sequence), 1 and " +
                             std::to_string(kScaleTokens));
    }
  }
  return {};
}

Status check_packed_fields(const hopper_attention_forward_args& a) {
  if (a.packed != 0 && a.packed != 1) {
    return Status::invalid(show("packed", a.packed) + "; allowed are 0 and 1");
  }
  if (a.packed == 0) {
    const bool used = a.cu_seqlens_q != nullptr || a.cu_seqlens_k != nullptr ||
                      a.seqused_q != nullptr || a.seqused_k != nullptr;
    if (!used) return {};
    return Status::invalid("packed is 0; cu_seqlens and seqused are for packed batches alone");
  }
  if (a.batch > kMaxLength) {
    return Status::invalid(show("batch", a.batch) + "; allowed are 0 to " +
                           std::to_string(kMaxLength));
  }
  if (a.dtype == HOPPER_ATTENTION_E4M3) {
    return {HOPPER_ATTENTION_NOT_SUPPORTED, "packed batches are float16 or bfloat16, not e4m3"};
  }
  return {};
}

// How far a token's index is shifted to find its scale's.
int scale_shift(int tokens) {
  if (tokens == 0) return 31;
  return tokens == 1 ? 0 : 7;
}
static_assert(kScaleTokens == 1 << 7, "scale_shift");

ScaleParams scale_params(const hopper_attention_forward_args& a) {
  return {a.q_descale,
          a.k_descale,
          a.v_descale,
          a.v_token_factor,
          a.q_descale_stride_batch,
          a.q_descale_stride_head,
          a.k_descale_stride_batch,
          a.k_descale_stride_head,
          a.v_descale_stride_batch,
          a.v_descale_stride_head,
          a.v_descale_stride_channel,
          a.v_token_factor_stride_batch,
          a.v_token_factor_stride_head,
          scale_shift(a.q_descale_tokens),
          scale_shift(a.k_descale_tokens),
          a.q_descale_per_kv != 0};
}

}  // namespace

Status check_forward_shape(const hopper_attention_forward_args& args) {
  const Field fields[] = {{"dtype", args.dtype, 0, 2},
                          {"batch", args.batch, 0, INT_MAX},
                          {"seqlen_q", args.seqlen_q, 0, kMaxLength},
                          {"seqlen_k", args.seqlen_k, 0, kMaxLength},
                          {"heads", args.heads, 0, INT_MAX},
                          {"heads_kv", args.heads_kv, 0, INT_MAX},
                          {"head_dim", args.head_dim, 8, 256},
                          {"head_dim_v", args.head_dim_v, 8, 256},
                          {"window_left", args.window_left, -1, INT_MAX},
                          {"window_right", args.window_right, -1, INT_MAX},
                          {"sm_margin", args.sm_margin, 0, INT_MAX}};
  for (const Field& field : fields) {
    if (field.value < field.low || field.value > field.high) {
      return Status::invalid(show(field.name, field.value) + "; allowed are " +
                             std::to_string(field.low) + " to " + std::to_string(field.high));
    }
  }
  if (args.heads > 0 && (args.heads_kv == 0 || args.heads % args.heads_kv != 0)) {
    return Status::invalid(show("heads_kv", args.heads_kv) + ", which does not divide " +
                           show("heads", args.heads));
  }
  if (args.head_dim % 8 != 0 || args.head_dim_v % 8 != 0) {
    return Status::invalid(show("head_dim", args.head_dim) + " and " +
                           show("head_dim_v", args.head_dim_v) + "; allowed are multiples of 8");
  }
  if (args.head_dim_v != args.head_dim && (args.head_dim > 192 || args.head_dim_v > 128)) {
    return {HOPPER_ATTENTION_NOT_SUPPORTED,
            show("head_dim", args.head_dim) + " with " + show("head_dim_v", args.head_dim_v) +
                "; head_dim_v may differ from head_dim where it is at most 128 and head_dim at "
                "most 192"};
  }
  if (!std::isfinite(args.softmax_scale)) return Status::invalid("softmax_scale is not finite");
  if (!std::isfinite(args.softcap) || args.softcap < 0.0f) {
    return Status::invalid("softcap is " + std::to_string(args.softcap) +
                           "; allowed are 0 (off) and positive numbers");
  }
  if (Status status = check_packed_fields(args); !status.ok()) return status;
  return check_fp8_fields(args);
}

Status check_packed_tensors(const hopper_attention_forward_args& a) {
  const struct {
    const char* name;
    const void* data;
    bool needed;
  } lengths[] = {{"cu_seqlens_q", a.cu_seqlens_q, true},
                 {"cu_seqlens_k", a.cu_seqlens_k, true},
                 {"seqused_q", a.seqused_q, false},
                 {"seqused_k", a.seqused_k, false}};
  for (const auto& tensor : lengths) {
    if (tensor.needed && tensor.data == nullptr) {
      return Status::invalid(std::string(tensor.name) + " is null");
    }
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % 4 != 0) {
      return Status::invalid(std::string(tensor.name) + " is not aligned to 4 bytes");
    }
  }
  return {};
}

Status check_forward_tensors(const hopper_attention_forward_args& a) {
  const int batch = a.packed ? 1 : a.batch;
  const TensorField tensors[] = {
      {"q",
       a.q,
       {{"batch", a.q_stride_batch, batch},
        {"seq", a.q_stride_seq, a.seqlen_q},
        {"head", a.q_stride_head, a.heads}}},
      {"out",
       a.out,
       {{"batch", a.out_stride_batch, batch},
        {"seq", a.out_stride_seq, a.seqlen_q},
        {"head", a.out_stride_head, a.heads}}},
      {"k",
       a.k,
       {{"batch", a.k_stride_batch, batch},
        {"seq", a.k_stride_seq, a.seqlen_k},
        {"head", a.k_stride_head, a.heads_kv}}},
      {"v",
       a.v,
       {{"batch", a.v_stride_batch, batch},
        {"seq", a.v_stride_seq, a.v_transposed ? a.head_dim_v : a.seqlen_k},
        {"head", a.v_stride_head, a.heads_kv}}}};
  for (const TensorField& tensor : tensors) {
    const bool keys = tensor.name[0] == 'k' || tensor.name[0] == 'v';
    if (keys && a.seqlen_k == 0) continue;  // never read
    const bool bytes = a.dtype == HOPPER_ATTENTION_E4M3 && tensor.data != a.out;
    if (Status status = check_tensor(tensor, bytes ? 16 : 8); !status.ok()) return status;
  }
  if (reinterpret_cast<std::uintptr_t>(a.sink) % 4 != 0) {
    return Status::invalid("sink is not aligned to 4 bytes");
  }
  const int alignment = a.packed ? 16 : 4;
  if (a.workspace == nullptr || reinterpret_cast<std::uintptr_t>(a.workspace) % alignment != 0) {
    return Status::invalid("workspace is null or not aligned to " + std::to_string(alignment) +
                           " bytes");
  }
  return a.packed ? check_packed_tensors(a) : Status{};
}

// How many blocks share their loads. All tiles take the same time: where as many clusters as fit
// take more rounds than blocks that are alone (where the last tile of each head has no partner, or
// where multiprocessors are odd), they cost more than they gain. A head's only tile has nobody to
// share with, and with few keys the two wait for each other more than they gain. Multiprocessors
// that others hold (sm_margin) may leave a cluster no room on its GPC until the end.
static int blocks_together(const ForwardConfig& config, std::int64_t m_blocks,
                           std::int64_t seqlen_k, std::int64_t heads, int num_sms, int sm_margin) {
  if (!is_clustered(config) || m_blocks < 2 || seqlen_k < kClusterKeys) return 1;
  if (num_sms < config.cluster || sm_margin > 0) return 1;
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t alone = ceil_div(m_blocks * heads, num_sms);
  const std::int64_t together =
      ceil_div(ceil_div(m_blocks, config.cluster) * heads, num_sms / config.cluster);
  return together > alone ? 1 : config.cluster;
}

// Which tiles there are and in which order, for a plan that has its config.
static Status plan_tiles(const hopper_attention_forward_args& args, int num_sms, bool longest_first,
                         ForwardPlan* plan) {
  const int tile_m = plan->config.tile_m();
  const std::int64_t m_blocks = (static_cast<std::int64_t>(args.seqlen_q) + tile_m - 1) / tile_m;
  const std::int64_t blocks =
      args.packed ? max_entries(args.seqlen_q, args.batch, tile_m) : m_blocks * args.batch;
  const int more = args.packed ? kMaxStartEntries : 0;
  const double tiles = static_cast<double>(blocks + more) * args.heads;
  if (tiles >= static_cast<double>(INT_MAX) - (1 << 20)) {
    return Status::invalid("batch x heads x seqlen_q is too large: more than 2^31 tiles of " +
                           std::to_string(tile_m) + " rows");
  }
  const std::int64_t bytes_per_key =
      (args.head_dim + args.head_dim_v) * element_bytes(plan->key.dtype);
  plan->cluster = 1;
  const int heads_per_kv = args.heads_kv > 0 ? args.heads / args.heads_kv : 1;
  plan->num_tiles = static_cast<int>(blocks) * args.heads;
  if (args.packed) {
    plan->packed_order = make_packed_order(args.seqlen_k, args.heads, heads_per_kv, bytes_per_key);
  } else {
    plan->cluster = blocks_together(plan->config, m_blocks, args.seqlen_k,
                                    static_cast<std::int64_t>(args.batch) * args.heads, num_sms,
                                    args.sm_margin);
    plan->order = make_tile_order(args.seqlen_q, args.heads, args.batch, plan->cluster * tile_m,
                                  longest_first, args.seqlen_k * bytes_per_key, heads_per_kv);
  }
  // GPCs are made of pairs of multiprocessors, so as many clusters run at once as there are pairs;
  // one that had to wait would only be late.
  const int clusters = std::max(1, num_sms - args.sm_margin) / plan->cluster;
  const int shares = args.packed ? plan->num_tiles : plan->order.num_tiles();
  plan->grid = std::min(clusters, shares) * plan->cluster;
  return {};
}

Status plan_forward(const hopper_attention_forward_args& args, int num_sms, ForwardPlan* plan) {
  plan->mask = make_mask(args.seqlen_q, args.seqlen_k, args.causal != 0, args.window_left,
                         args.window_right);
  // The kernel takes maxima of raw scores, so a scale that is not positive is applied before.
  const bool fp8 = args.dtype == HOPPER_ATTENTION_E4M3;
  const bool fast = args.accumulation == HOPPER_ATTENTION_ACCUMULATE_FAST;
  const bool key_scales =
      (args.k_descale != nullptr && args.k_descale_tokens == 1) || args.v_token_factor != nullptr;
  plan->transform_scores = args.softcap > 0.0f || args.softmax_scale <= 0.0f || key_scales;
  plan->scales = scale_params(args);
  plan->cap = args.softcap;
  plan->inner_scale = args.softcap > 0.0f ? args.softmax_scale / args.softcap : args.softmax_scale;
  plan->scale_log2 = plan->transform_scores ? kLog2E : args.softmax_scale * kLog2E;

  const Dtype dtype = fp8 && fast ? Dtype::kE4M3Fast : static_cast<Dtype>(args.dtype);
  const HeadDims dims = tile_head_dims(dtype, args.head_dim, args.head_dim_v);
  const bool full = plan->mask.full() && !plan->transform_scores;
  const bool plain = full && (!fp8 || (args.v_transposed && !fast));
  const MaskKind mask =
      args.packed ? MaskKind::kPacked
                  : tile_mask(dtype, dims.qk, plain, args.seqlen_k, plan->mask.most_keys());
  plan->key = {dtype, dims.qk, dims.v, mask};
  plan->config = make_forward_config(plan->key);

  return plan_tiles(args, num_sms, !full, plan);
}

}  // namespace hopper_attention
