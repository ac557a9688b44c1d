#include "quantize/problem.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <utility>

#include "hopper_attention/mask.h"

namespace hopper_attention {
namespace {

using Args = hopper_attention_quantize_args;

std::string show(const std::string& name, long long value) {
  return name + " is " + std::to_string(value);
}

bool packed(const Args& args) { return args.cu_seqlens_q != nullptr; }

Status check_ranges(const Args& a) {
  const struct {
    const char* name;
    long long value, low, high;
  } fields[] = {{"dtype", a.dtype, 0, 1},
                {"batch", a.batch, 0, kMaxLength},
                {"seqlen_q", a.seqlen_q, 0, kMaxLength},
                {"seqlen_k", a.seqlen_k, 0, kMaxLength},
                {"heads", a.heads, 0, kMaxLength},
                {"heads_kv", a.heads_kv, 0, kMaxLength},
                {"head_dim", a.head_dim, 8, 256},
                {"head_dim_v", a.head_dim_v, 8, 256}};
  for (const auto& field : fields) {
    if (field.value < field.low || field.value > field.high) {
      return Status::invalid(show(field.name, field.value) + "; allowed are " +
                             std::to_string(field.low) + " to " + std::to_string(field.high));
    }
  }
  if (static_cast<double>(a.batch) * std::max(a.heads, a.heads_kv) >= 1ll << 31) {
    return Status::invalid(show("batch", a.batch) + ": batch times heads must be below 2^31");
  }
  if (a.head_dim % 8 != 0 || a.head_dim_v % 8 != 0) {
    return Status::invalid(show("head_dim", a.head_dim) + " and " +
                           show("head_dim_v", a.head_dim_v) + "; allowed are multiples of 8");
  }
  return {};
}

Status check_scales(const Args& a) {
  if (a.qk_scale < HOPPER_ATTENTION_SCALE_TENSOR || a.qk_scale > HOPPER_ATTENTION_SCALE_TOKEN) {
    return Status::invalid(show("qk_scale", a.qk_scale) +
                           "; allowed are 0 (tensor), 1 (head), 2 (block) and 3 (token)");
  }
  if (a.v_scale != HOPPER_ATTENTION_SCALE_TENSOR && a.v_scale != HOPPER_ATTENTION_SCALE_HEAD &&
      a.v_scale != HOPPER_ATTENTION_SCALE_TOKEN && a.v_scale != HOPPER_ATTENTION_SCALE_CHANNEL) {
    return Status::invalid(show("v_scale", a.v_scale) +
                           "; allowed are 0 (tensor), 1 (head), 3 (token) and 4 (channel)");
  }
  return {};
}

Status check_rotary(const Args& a) {
  if ((a.rotary_cos == nullptr) != (a.rotary_sin == nullptr)) {
    return Status::invalid("rotary_cos and rotary_sin must both be given or both be null");
  }
  if (a.rotary_cos == nullptr) return {};
  if (a.rotary_dim % 16 != 0 || a.rotary_dim < 16 || a.rotary_dim > a.head_dim) {
    return Status::invalid(show("rotary_dim", a.rotary_dim) +
                           "; allowed are multiples of 16 up to " + show("head_dim", a.head_dim));
  }
  if (a.rotary_max_len < 0) return Status::invalid(show("rotary_max_len", a.rotary_max_len));
  // Sums with lengths stay far from the ends of 64 bits.
  constexpr std::int64_t kMaxOffset = std::int64_t{1} << 40;
  if (std::max(std::abs(a.rotary_q_offset), std::abs(a.rotary_k_offset)) > kMaxOffset) {
    return Status::invalid("rotary_q_offset or rotary_k_offset is beyond 2^40");
  }
  if (a.rotary_q_aligned != 0 && a.heads > 0 && a.heads_kv == 0) {
    return Status::invalid("rotary_q_aligned needs k, but heads_kv is 0");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(a.rotary_cos) |
                       reinterpret_cast<std::uintptr_t>(a.rotary_sin);
  if (address % 16 != 0) {
    return Status::invalid("rotary_cos or rotary_sin is not aligned to 16 bytes");
  }
  return {};
}

// One of q, k and v as the caller gave it.
struct View {
  const char* name;
  const void* in;
  void* out;
  float* descale;
  std::int64_t in_strides[3];  // batch, seq, head
  std::int64_t out_strides[3];
  int seqlen, heads, head_dim;
  bool transposed;
};

View view(const Args& a, int which) {
  if (which == kQ) {
    return {"q",
            a.q,
            a.q_out,
            a.q_descale,
            {a.q_stride_batch, a.q_stride_seq, a.q_stride_head},
            {a.q_out_stride_batch, a.q_out_stride_seq, a.q_out_stride_head},
            a.seqlen_q,
            a.heads,
            a.head_dim,
            false};
  }
  if (which == kK) {
    return {"k",
            a.k,
            a.k_out,
            a.k_descale,
            {a.k_stride_batch, a.k_stride_seq, a.k_stride_head},
            {a.k_out_stride_batch, a.k_out_stride_seq, a.k_out_stride_head},
            a.seqlen_k,
            a.heads_kv,
            a.head_dim,
            false};
  }
  return {"v",
          a.v,
          a.v_out,
          a.v_descale,
          {a.v_stride_batch, a.v_stride_seq, a.v_stride_head},
          {a.v_out_stride_batch, a.v_out_stride_seq, a.v_out_stride_head},
          a.seqlen_k,
          a.heads_kv,
          a.head_dim_v,
          a.v_transposed != 0};
}

Status check_view(const Args& a, const View& v) {
  const std::string name = v.name;
  const bool of_tokens =
      v.name[0] != 'v' && (a.qk_scale == HOPPER_ATTENTION_SCALE_TOKEN ||
                           (a.qk_scale == HOPPER_ATTENTION_SCALE_BLOCK && !packed(a)));
  const bool no_scales = v.seqlen == 0 && of_tokens;
  if (v.descale == nullptr && !no_scales) return Status::invalid(name + "_descale is null");
  if (v.seqlen == 0) return {};  // no element is read or written
  if (v.in == nullptr) return Status::invalid(name + " is null");
  if (reinterpret_cast<std::uintptr_t>(v.in) % 2 != 0) {
    return Status::invalid(name + " is not aligned to its 2-byte elements");
  }
  if (v.out == nullptr || reinterpret_cast<std::uintptr_t>(v.out) % 16 != 0) {
    return Status::invalid(name + "_out is null or not aligned to 16 bytes");
  }
  const char* dims[] = {"batch", "seq", "head"};
  const int sizes[] = {packed(a) ? 1 : a.batch, v.transposed ? v.head_dim : v.seqlen, v.heads};
  for (int i = 0; i < 3; ++i) {
    if (v.in_strides[i] < 0 || v.in_strides[i] >= (1ll << 39)) {
      return Status::invalid(show(name + "_stride_" + dims[i], v.in_strides[i]) +
                             "; allowed are 0 to 2^39");
    }
    const std::int64_t out = v.out_strides[i];
    if (sizes[i] > 1 && (out % 16 != 0 || out < 16 || out >= (1ll << 39))) {
      return Status::invalid(show(name + "_out_stride_" + dims[i], out) +
                             "; allowed are multiples of 16 from 16 to 2^39");
    }
  }
  return {};
}

// Without the pointers into the workspace.
QuantizeTensor make_tensor(const Args& a, const View& v, ScaleKind scale) {
  QuantizeTensor t{};
  t.in = v.in;
  t.out = static_cast<std::uint8_t*>(v.out);
  t.descale = v.descale;
  t.cu_seqlens = v.name[0] == 'q' ? a.cu_seqlens_q : a.cu_seqlens_k;
  t.in_stride_batch = v.in_strides[0];
  t.in_stride_seq = v.in_strides[1];
  t.in_stride_head = v.in_strides[2];
  t.out_stride_batch = v.out_strides[0];
  t.out_stride_seq = v.out_strides[1];
  t.out_stride_head = v.out_strides[2];
  t.batch = a.batch;
  t.seqlen = v.seqlen;
  t.heads = v.heads;
  t.head_dim = v.head_dim;
  t.slots = static_cast<int>(quantize_slots(v.seqlen, a.batch, packed(a)));
  t.scale = scale;
  t.find_amax = scale != ScaleKind::kBlock && scale != ScaleKind::kToken;
  // The stride of a dimension of size 1 is never taken.
  const int sizes[] = {packed(a) ? 1 : a.batch, v.seqlen, v.heads};
  t.aligned = reinterpret_cast<std::uintptr_t>(v.in) % 16 == 0;
  for (int i = 0; i < 3; ++i) t.aligned = t.aligned && (sizes[i] == 1 || v.in_strides[i] % 8 == 0);
  return t;
}

int tile_bytes(const QuantizeTensor& tensor) { return 2 * kQuantizeTokens * tensor.head_dim; }

// Tiles that blocks have in work among them: a second pass comes so much later than it must. Two
// teams, whose tiles are half as large, learn of a head's last tile later (docs/quantizer.md).
int tiles_ahead(const QuantizeBlocks& blocks, const QuantizeTensor& tensor) {
  const int ahead = blocks.count * (blocks.stages + 1) / 2;
  return tensor.scale == ScaleKind::kHead && blocks.teams > 1 ? ahead + ahead / 2 : ahead;
}

constexpr int kNobody = -1;

// Whose only pass takes turns with V's two. Where those raise maxima of channels they keep workers
// busy, and it keeps memory busy; but it is also in the way of what L2 keeps for V's second pass,
// and two teams work less well on three passes: each head dimension has what was fastest
// (docs/quantizer.md). What is left of a Q that is less than a tile for everybody would be a last
// round in which some idle.
int beside_v(const QuantizePlan& plan, bool little_of_q) {
  const QuantizeTensor* t = plan.params.tensors;
  const bool of_q = (plan.tile == 128 && t[kV].scale == ScaleKind::kChannel) || little_of_q;
  const int best = plan.tile == 256 ? kK : of_q ? kQ : kNobody;
  return t[kV].find_amax && best != kNobody && !t[best].find_amax ? best : kNobody;
}

// A measuring pass over V or Q that comes first waits for nothing either: what it finds goes out
// later. But maxima of channels are raised at once, from zero.
int draws_of_measuring(const QuantizeParams& params, int at_once) {
  const QuantizeSchedule& s = params.schedule;
  if (s.num_segments < 2 || s.segments[0].by_streams.divisor > 1) return 0;
  const QuantizeStream& first = s.streams[s.segments[0].streams[0]];
  const bool by_channel = params.tensors[first.which].scale == ScaleKind::kChannel;
  if (first.pass != QuantizePass::kAmax || by_channel) return 0;
  return std::min(kEarlyDraws, s.segments[1].first_ticket / at_once);
}

void set_rotation(const Args& a, QuantizeParams* params) {
  if (a.rotary_cos != nullptr) {
    params->rotary = {a.rotary_cos,
                      a.rotary_sin,
                      a.rotary_dim,
                      a.rotary_max_len,
                      a.rotary_q_offset,
                      a.rotary_k_offset,
                      a.rotary_interleaved != 0,
                      a.rotary_q_aligned != 0};
  }
  if (a.hadamard == 0) return;
  params->hadamard_log2 = hadamard_log2(a.head_dim);
  params->hadamard_scale =
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(1 << params->hadamard_log2)));
  // Channels past the head dimension are zeros and must not become negative ones.
  for (int channel = 0; channel < a.head_dim; ++channel) {
    params->sign_bits[channel / 32] |= a.sign_bits[channel / 32] & (1u << channel % 32);
  }
}

}  // namespace

Status check_quantize_shape(const Args& a) {
  if (Status status = check_ranges(a); !status.ok()) return status;
  if (Status status = check_scales(a); !status.ok()) return status;
  if ((a.cu_seqlens_q == nullptr) != (a.cu_seqlens_k == nullptr)) {
    return Status::invalid("cu_seqlens_q and cu_seqlens_k must both be given or both be null");
  }
  return check_rotary(a);
}

Status check_quantize_tensors(const Args& a) {
  for (int which : {kQ, kK, kV}) {
    const View v = view(a, which);
    if (v.heads == 0) continue;
    if (Status status = check_view(a, v); !status.ok()) return status;
  }
  if (a.heads_kv > 0 && a.smooth_k != 0 && a.k_mean == nullptr) {
    return Status::invalid("k_mean is null, but smooth_k is set");
  }
  if (reinterpret_cast<std::uintptr_t>(a.k_mean) % 16 != 0) {
    return Status::invalid("k_mean is not aligned to 16 bytes");
  }
  const bool tokens = a.v_scale == HOPPER_ATTENTION_SCALE_TOKEN && a.seqlen_k > 0;
  if (a.heads_kv > 0 && tokens && a.v_token_factor == nullptr) {
    return Status::invalid("v_token_factor is null, but v_scale is 3 (token)");
  }
  if (a.workspace == nullptr || reinterpret_cast<std::uintptr_t>(a.workspace) % 16 != 0) {
    return Status::invalid("workspace is null or not aligned to 16 bytes");
  }
  return {};
}

QuantizeWorkspace quantize_workspace(const Args& a) {
  return quantize_workspace({a.batch, a.heads, a.heads_kv, a.head_dim, a.head_dim_v,
                             quantize_slots(a.seqlen_q, a.batch, packed(a)),
                             quantize_slots(a.seqlen_k, a.batch, packed(a)), packed(a),
                             a.smooth_k != 0, static_cast<ScaleKind>(a.qk_scale),
                             static_cast<ScaleKind>(a.v_scale)});
}

Status plan_quantize(const Args& a, QuantizePlan* plan) {
  QuantizeParams& params = plan->params;
  params = {};
  const QuantizeWorkspace& w = plan->workspace = quantize_workspace(a);
  auto* words = static_cast<std::uint32_t*>(a.workspace);
  const std::int64_t sequences = packed(a) ? std::min(a.batch, 1) : a.batch;
  double tiles = 0;
  for (int which : {kV, kK, kQ}) {
    const auto scale = static_cast<ScaleKind>(which == kV ? a.v_scale : a.qk_scale);
    QuantizeTensor& tensor = params.tensors[which] = make_tensor(a, view(a, which), scale);
    tensor.found = reinterpret_cast<std::uint64_t*>(words + w.tensors[which].found);
    tensor.measured = words + w.tensors[which].measured;
    tensor.infinite = words + w.tensors[which].infinite;
    tensor.amax = words + w.tensors[which].amax;
    tiles += static_cast<double>(sequences) * std::max(tensor.slots, 1) * tensor.heads;
    if (tiles >= static_cast<double>(INT_MAX / 4)) {
      return Status::invalid(
          "batch x heads x sequence length is too large: more than 2^29 blocks "
          "of 128 tokens");
    }
    // All heads side by side, whose rows are neighbours in memory, unless heads are waited for.
    const bool by_head = tensor.find_amax && scale != ScaleKind::kTensor;
    const int group_tiles = by_head ? kGroupBytes / tile_bytes(tensor) : INT_MAX;
    tensor.order = head_order(sequences, tensor.heads, tensor.slots, group_tiles);
  }
  set_rotation(a, &params);
  params.ticket = words + w.ticket;
  params.zeros = words;
  params.num_zeros = w.zero_words;
  params.v_transposed = a.v_transposed != 0;
  params.v_token_factor = a.v_token_factor;
  params.smooth_k = a.smooth_k != 0 && a.heads_kv > 0;
  if (params.smooth_k) {
    params.k_mean = a.k_mean;
    params.k_partial = reinterpret_cast<float*>(words + w.k_partial);
  }
  const int head_dim =
      std::max(a.heads > 0 || a.heads_kv > 0 ? a.head_dim : 0, a.heads_kv > 0 ? a.head_dim_v : 0);
  plan->tile = head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  return {};
}

void schedule_quantize(const QuantizeBlocks& blocks, QuantizePlan* plan) {
  QuantizeParams& params = plan->params;
  QuantizeSchedule& schedule = params.schedule = {};
  const QuantizeTensor &v = params.tensors[kV], &q = params.tensors[kQ], &k = params.tensors[kK];
  // Kernels before this one clear the workspace and make K's mean: meanwhile, blocks have tiles of
  // Q that wait for nothing.
  const int at_once = blocks.count * blocks.teams;
  const int draws = params.smooth_k ? kEarlyDrawsOfMean : kEarlyDraws;
  params.first_draws = q.find_amax ? 0 : std::min(draws, q.order.num_tiles / at_once);
  const std::int32_t early = params.first_draws * at_once;
  std::int32_t time = schedule.add_last(kQ, 0, early, false, 0);
  // L2 has the end of a K whose mean was made, but its tiles finish the factors of V's tokens.
  const bool k_first = params.smooth_k && !k.find_amax && v.scale != ScaleKind::kToken;
  std::int32_t placed[3] = {};
  placed[kQ] = early;
  const auto place_rest = [&](int which) {
    const std::int32_t all = params.tensors[which].order.num_tiles;
    const std::int32_t first = std::exchange(placed[which], all);
    return schedule.add_last(which, first, all - first, which == kK && k_first, time);
  };
  const int beside = beside_v(*plan, q.order.num_tiles - early < at_once);
  if (k_first && beside != kK) time = place_rest(kK);
  if (beside != kNobody) place_rest(beside);
  // What needs two passes comes before Q, so that no block ends up waiting for others' last tiles.
  for (int which : {kV, kK, kQ}) {
    const QuantizeTensor& tensor = params.tensors[which];
    if (tensor.find_amax) {
      time = schedule.add_both(which, tensor.order, tensor.scale == ScaleKind::kTensor,
                               kKeptBytes / tile_bytes(tensor), tiles_ahead(blocks, tensor), time);
    } else {
      time = place_rest(which);
    }
  }
  schedule.finish();
  if (q.find_amax) params.first_draws = draws_of_measuring(params, at_once);
}

}  // namespace hopper_attention
