// hopper/backward/problem.cpp: refusals name the field and its value; plans are what was asked; the
// workspace holds what the kernels write.
#include <climits>
#include <cmath>
#include <cstdint>
#include <string>

#include "backward/problem.h"
#include "backward_instances.h"
#include "check.h"
#include "hopper_attention/backward_budget.h"
#include "small_problem.h"

namespace {

using namespace hopper_attention;

using Args = hopper_attention_backward_args;

Args valid_args() { return small_problem<Args>(); }

template <class Change>
void refuses(const char* text, hopper_attention_status code, Change change) {
  Args args = valid_args();
  change(args);
  check_refused(check_backward_shape(args), text, code);
}

void shapes_are_refused_by_name_and_value() {
  const auto invalid = HOPPER_ATTENTION_INVALID_ARGUMENT;
  check::context = "unchanged";
  CHECK(check_backward_shape(valid_args()).ok());
  refuses("dtype is 2; allowed are 0", invalid, [](Args& a) { a.dtype = HOPPER_ATTENTION_E4M3; });
  refuses("dtype is -1", invalid, [](Args& a) { a.dtype = -1; });
  refuses("batch is -3", invalid, [](Args& a) { a.batch = -3; });
  refuses("seqlen_q is -1", invalid, [](Args& a) { a.seqlen_q = -1; });
  refuses("seqlen_k is 1073741824", invalid, [](Args& a) { a.seqlen_k = 1 << 30; });
  refuses("heads_kv is 3", invalid, [](Args& a) { a.heads_kv = 3; });
  refuses("head_dim is 264", invalid, [](Args& a) { a.head_dim = 264; });
  refuses("head_dim_v is 36", invalid, [](Args& a) { a.head_dim_v = 36; });
  refuses("window_left is -2", invalid, [](Args& a) { a.window_left = -2; });
  refuses("window_right is -5", invalid, [](Args& a) { a.window_right = -5; });
  refuses("softmax_scale", invalid, [](Args& a) { a.softmax_scale = std::nanf(""); });
  refuses("softcap is -1", invalid, [](Args& a) { a.softcap = -1.0f; });
  refuses("deterministic is 2", invalid, [](Args& a) { a.deterministic = 2; });
  refuses("packed is 2", invalid, [](Args& a) { a.packed = 2; });
  refuses("batch is 1073741824", invalid, [](Args& a) { a.packed = 1, a.batch = 1 << 30; });
  for (const auto lengths :
       {&Args::cu_seqlens_q, &Args::cu_seqlens_k, &Args::seqused_q, &Args::seqused_k}) {
    refuses("packed is 0; cu_seqlens", invalid, [=](Args& a) { a.*lengths = &a.dtype; });
  }
  const auto unsupported = HOPPER_ATTENTION_NOT_SUPPORTED;
  refuses("head_dim_v is 136", unsupported, [](Args& a) { a.head_dim_v = 136; });
}

// Memory whose address is only looked at.
alignas(128) char memory[256];

Args valid_tensors() {
  Args args = valid_args();
  args.q = args.k = args.v = args.out = args.dout = memory;
  args.dq = args.dk = args.dv = args.workspace = memory;
  args.lse = reinterpret_cast<const float*>(memory);
  std::int64_t* const strides[][3] = {
      {&args.q_stride_batch, &args.q_stride_seq, &args.q_stride_head},
      {&args.k_stride_batch, &args.k_stride_seq, &args.k_stride_head},
      {&args.v_stride_batch, &args.v_stride_seq, &args.v_stride_head},
      {&args.out_stride_batch, &args.out_stride_seq, &args.out_stride_head},
      {&args.dout_stride_batch, &args.dout_stride_seq, &args.dout_stride_head},
      {&args.dq_stride_batch, &args.dq_stride_seq, &args.dq_stride_head},
      {&args.dk_stride_batch, &args.dk_stride_seq, &args.dk_stride_head},
      {&args.dv_stride_batch, &args.dv_stride_seq, &args.dv_stride_head}};
  for (const auto& of_tensor : strides) {
    *of_tensor[0] = 500 * 8 * 128, *of_tensor[1] = 8 * 128, *of_tensor[2] = 128;
  }
  return args;
}

template <class Change>
void refuses_tensor(const char* text, Change change) {
  Args args = valid_tensors();
  check::context = "unchanged";
  CHECK(check_backward_tensors(args).ok());
  change(args);
  check_refused(check_backward_tensors(args), text, HOPPER_ATTENTION_INVALID_ARGUMENT);
}

void tensors_are_refused_by_name() {
  refuses_tensor("q is null", [](Args& a) { a.q = nullptr; });
  refuses_tensor("k is null", [](Args& a) { a.k = nullptr; });
  refuses_tensor("v is null", [](Args& a) { a.v = nullptr; });
  refuses_tensor("out is null", [](Args& a) { a.out = nullptr; });
  refuses_tensor("dout is null", [](Args& a) { a.dout = nullptr; });
  refuses_tensor("dq is null", [](Args& a) { a.dq = nullptr; });
  refuses_tensor("dk is null", [](Args& a) { a.dk = nullptr; });
  refuses_tensor("dv is null", [](Args& a) { a.dv = nullptr; });
  refuses_tensor("lse is null", [](Args& a) { a.lse = nullptr; });
  refuses_tensor("workspace is null", [](Args& a) { a.workspace = nullptr; });
  refuses_tensor("workspace is", [](Args& a) { a.workspace = memory + 64; });
  refuses_tensor("dv is not aligned", [](Args& a) { a.dv = memory + 8; });
  const auto* odd = reinterpret_cast<const float*>(memory + 2);
  refuses_tensor("lse is not aligned", [&](Args& a) { a.lse = odd; });
  refuses_tensor("dlse is not aligned", [&](Args& a) { a.dlse = odd; });
  refuses_tensor("sink is not aligned", [&](Args& a) { a.sink = odd; });
  refuses_tensor("dsink is not aligned", [](Args& a) {
    a.sink = reinterpret_cast<const float*>(memory);
    a.dsink = reinterpret_cast<float*>(memory + 2);
  });
  refuses_tensor("sink is null, but dsink",
                 [](Args& a) { a.dsink = reinterpret_cast<float*>(memory); });
  refuses_tensor("dout_stride_seq is 1028", [](Args& a) { a.dout_stride_seq = 1028; });
  refuses_tensor("dk_stride_head is -128", [](Args& a) { a.dk_stride_head = -128; });
  refuses_tensor("dq_stride_batch", [](Args& a) { a.dq_stride_batch = std::int64_t{1} << 40; });
}

Args packed_tensors() {
  Args args = valid_tensors();
  args.packed = 1;
  args.cu_seqlens_q = args.cu_seqlens_k = reinterpret_cast<const std::int32_t*>(memory);
  return args;
}

void lengths_are_refused_by_name() {
  const auto refuses_lengths = [](const char* text, auto change) {
    Args args = packed_tensors();
    change(args);
    check_refused(check_backward_tensors(args), text, HOPPER_ATTENTION_INVALID_ARGUMENT);
  };
  const auto* odd = reinterpret_cast<const std::int32_t*>(memory + 2);
  refuses_lengths("cu_seqlens_q is null", [](Args& a) { a.cu_seqlens_q = nullptr; });
  refuses_lengths("cu_seqlens_k is null", [](Args& a) { a.cu_seqlens_k = nullptr; });
  refuses_lengths("cu_seqlens_k is not aligned", [&](Args& a) { a.cu_seqlens_k = odd; });
  refuses_lengths("seqused_q is not aligned", [&](Args& a) { a.seqused_q = odd; });
  refuses_lengths("seqused_k is not aligned", [&](Args& a) { a.seqused_k = odd; });
  refuses_lengths("workspace is null", [](Args& a) { a.workspace = nullptr; });
  refuses_lengths("dk_stride_head is 12", [](Args& a) { a.dk_stride_head = 12; });
  Args args = packed_tensors();
  args.dq_stride_batch = 3;
  check::context = "a packed batch's batch stride";
  CHECK(check_backward_tensors(args).ok());
  args.batch = 0;
  args.dq = nullptr;
  check::context = "a packed batch's rows behind no sequence at all";
  check_refused(check_backward_tensors(args), "dq is null", HOPPER_ATTENTION_INVALID_ARGUMENT);
}

void what_is_never_touched_is_not_checked() {
  Args args = valid_tensors();
  args.seqlen_k = 0;
  args.k = args.v = args.dk = args.dv = nullptr;
  check::context = "no keys";
  CHECK(check_backward_tensors(args).ok());
  args = valid_tensors();
  args.seqlen_q = 0;
  args.q = args.out = args.dout = args.dq = args.workspace = nullptr;
  args.lse = nullptr;
  check::context = "no queries";
  CHECK(check_backward_tensors(args).ok());
  args = valid_tensors();
  args.batch = 1;
  args.dv_stride_batch = 3;
  check::context = "the batch stride of one batch";
  CHECK(check_backward_tensors(args).ok());
}

BackwardPlan plan_of(const Args& args) {
  BackwardPlan plan;
  CHECK(check_backward_shape(args).ok());
  CHECK(plan_backward(args, &plan).ok());
  return plan;
}

// P = exp2(scale_log2 * S - LSE in base 2), or with cap_log2 * tanh(S * inner_scale).
void scores_are_scaled_as_in_the_forward_pass() {
  check::context = "plain";
  Args args = valid_args();
  BackwardPlan plan = plan_of(args);
  CHECK(plan.key.mask == MaskKind::kFull && plan.cap_log2 == 0.0f && !plan.order.longest_first);
  CHECK(std::fabs(plan.scale_log2 - 0.088f / std::log(2.0f)) < 1e-6f);
  for (float scale : {0.0f, -0.5f}) {
    args.softmax_scale = scale;
    plan = plan_of(args);
    CHECK(plan.key.mask == MaskKind::kFull);
    CHECK(std::fabs(plan.scale_log2 - scale / std::log(2.0f)) < 1e-6f);
  }
  check::context = "causal";
  args = valid_args();
  args.causal = 1;
  plan = plan_of(args);
  CHECK(plan.key.mask == MaskKind::kMasked && plan.cap_log2 == 0.0f && plan.order.longest_first);
  check::context = "softcap";
  args = valid_args();
  args.softcap = 20.0f;
  plan = plan_of(args);
  CHECK(plan.key.mask == MaskKind::kCapped);
  CHECK(std::fabs(plan.cap_log2 - 20.0f / std::log(2.0f)) < 1e-5f);
  CHECK(std::fabs(plan.inner_scale - 0.088f / 20.0f) < 1e-8f);
}

// A group of heads has two waves of blocks for an H100's 132 multiprocessors where there are as
// many; where the order of the adds is fixed, what L2 holds and no more under a mask without groups
// of query heads, and several heads without a mask.
void groups_of_heads_are_large_enough() {
  Args args = valid_args();
  args.causal = 1;
  args.batch = 2;
  args.heads_kv = 8;
  args.heads = 32;
  for (int seqlen : {500, 8192, 65536}) {
    for (int deterministic : {0, 1}) {
      args.seqlen_q = args.seqlen_k = seqlen;
      args.deterministic = deterministic;
      check::context = std::to_string(seqlen) + (deterministic ? ", deterministic" : "");
      const BackwardPlan plan = plan_of(args);
      const int blocks = plan.order.num_m_blocks;
      CHECK(plan.order.groups.size * blocks >= 256 || plan.order.groups.size == 16);
      CHECK(plan.order.groups.size <= 16);
      CHECK(plan.descending == (deterministic == 1) && !plan.last_first);
    }
  }
  args.heads = args.heads_kv;
  check::context = "65536, deterministic, no groups of query heads";
  BackwardPlan plan = plan_of(args);
  CHECK(plan.last_first && !plan.descending && plan.order.groups.size == 1);
  args.causal = 0;
  check::context = "65536, deterministic, full";
  plan = plan_of(args);
  CHECK(!plan.last_first && !plan.descending && plan.order.groups.size == 4);
  CHECK(plan.order.longest_first);  // several heads in turn
  args.deterministic = 0;
  CHECK(!plan_of(args).order.longest_first);
}

int count_up(int length, int tile) {
  int blocks = 0;
  for (int at = 0; at < length; at += tile) ++blocks;
  return blocks;
}

void grids_count_the_blocks_of_queries_and_keys() {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (int head_dim_v = 8; head_dim_v <= 256; head_dim_v += 8) {
      Args args = valid_args();
      args.head_dim = head_dim;
      args.head_dim_v = head_dim_v;
      if (!check_backward_shape(args).ok()) continue;
      check::context = std::to_string(head_dim) + ", " + std::to_string(head_dim_v);
      const BackwardPlan plan = plan_of(args);
      CHECK(plan.key.head_dim >= head_dim && plan.key.head_dim_v >= head_dim_v);
      int rows = 0;
      for (const BackwardInstanceRow& row : kBackwardInstanceRows) rows += row.key == plan.key;
      CHECK(rows == 1);
      CHECK(plan.num_m_blocks == count_up(300, plan.config.tile_m));
      CHECK(plan.query_grid == plan.num_m_blocks * 8 * 2);
      const int cluster = cluster_blocks(plan.config);
      CHECK(plan.key_grid == count_up(500, cluster * plan.config.tile_n) * cluster * 2 * 2);
      CHECK(plan.order.num_tiles() * cluster == plan.key_grid);
    }
  }
  for (int Args::* size : {&Args::batch, &Args::seqlen_q, &Args::heads}) {
    Args args = valid_args();
    args.*size = 0;
    check::context = "no queries";
    CHECK(plan_of(args).query_grid == 0);
  }
  for (int Args::* size : {&Args::batch, &Args::seqlen_k}) {
    Args args = valid_args();
    args.*size = 0;
    check::context = "no keys";
    CHECK(plan_of(args).key_grid == 0);
  }
}

// At most a block more for each sequence, and for the rows behind the last one.
void packed_grids_have_room_for_every_sequence() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    if (row.key.mask != MaskKind::kPacked) continue;
    for (bool capped : {false, true}) {
      Args args = valid_args();
      args.packed = 1;
      args.dtype = static_cast<int>(row.key.dtype);
      args.head_dim = row.key.head_dim;
      args.head_dim_v = row.key.head_dim_v;
      args.softcap = capped ? 30.0f : 0.0f;
      check::context = std::string(row.name) + (capped ? ", capped" : "");
      BackwardPlan plan = plan_of(args);
      CHECK(plan.key.mask == (capped ? MaskKind::kCapped : MaskKind::kPacked));
      CHECK(plan.num_m_blocks == max_blocks(300, 2, plan.config.tile_m));
      CHECK(plan.query_grid == plan.num_m_blocks * 8);
      const int cluster = cluster_blocks(plan.config);
      CHECK(plan.max_key_entries == max_blocks(500, 2, cluster * plan.config.tile_n));
      CHECK(plan.key_grid == plan.max_key_entries * cluster * 2);
      CHECK(plan.packed_order.heads == 2 && plan.packed_order.head_groups.size >= 1);
      args.batch = 0;  // all rows are behind the last sequence, and are to be written
      CHECK(plan_of(args).query_grid > 0 && plan_of(args).key_grid > 0);
    }
  }
  for (int Args::* size : {&Args::seqlen_q, &Args::heads}) {
    Args args = valid_args();
    args.packed = 1;
    args.*size = 0;
    check::context = "a packed batch without queries";
    CHECK(plan_of(args).query_grid == 0);
  }
  Args args = valid_args();
  args.packed = 1;
  args.seqlen_k = 0;
  check::context = "a packed batch without keys";
  CHECK(plan_of(args).key_grid == 0 && plan_of(args).query_grid > 0);
}

// A cluster whose second block has no keys is there all the same.
void clusters_are_whole() {
  for (int seqlen_k : {1, 64, 65, 128, 129, 192, 193}) {
    Args args = valid_args();
    args.head_dim = args.head_dim_v = 256;
    args.seqlen_k = seqlen_k;
    check::context = std::to_string(seqlen_k) + " keys";
    const BackwardPlan plan = plan_of(args);
    CHECK(cluster_blocks(plan.config) == 2 && plan.config.tile_n == 64);
    CHECK(plan.key_grid == (seqlen_k <= 128 ? 2 : 4) * 2 * 2);
  }
}

void too_many_tiles_are_refused() {
  Args dense = valid_args();
  dense.seqlen_q = kMaxLength;
  dense.batch = 1 << 16;
  Args packed = valid_args();  // 2^29 sequences may begin as many blocks
  packed.packed = 1;
  packed.batch = 1 << 29;
  for (const Args& args : {dense, packed}) {
    BackwardPlan plan;
    check_refused(plan_backward(args, &plan), "seqlen", HOPPER_ATTENTION_INVALID_ARGUMENT);
  }
}

// One after the other, aligned, each with room for its numbers, and no more than that: dQ's
// accumulator in float32, two numbers a query row, in a fixed order the turns, and of a packed
// batch the list of key blocks.
void the_workspace_is_dq_and_two_numbers_a_row() {
  for (const BackwardInstanceRow& row : kBackwardInstanceRows) {
    for (bool deterministic : {false, true}) {
      Args args = valid_args();
      args.dtype = static_cast<int>(row.key.dtype);
      args.head_dim = row.key.head_dim;
      args.head_dim_v = row.key.head_dim_v;
      args.causal = row.key.mask == MaskKind::kMasked;
      args.packed = row.key.mask == MaskKind::kPacked;
      args.softcap = row.key.mask == MaskKind::kCapped ? 30.0f : 0.0f;
      const BackwardPlan plan = plan_of(args);
      check::context = row.name;
      CHECK(plan.key == row.key);
      const WorkspaceLayout layout = workspace_layout(plan, args.packed != 0, deterministic);
      const std::uint64_t heads = args.packed ? 8 : 2 * 8;
      const std::uint64_t rows = heads * plan.num_m_blocks * plan.config.tile_m;
      CHECK(layout.lse_log2 >= rows * row.key.head_dim * 4);
      CHECK(layout.delta - layout.lse_log2 >= rows * 4);
      CHECK(layout.turns - layout.delta >= rows * 4);
      const std::uint64_t turns = rows / plan.config.tile_m;
      CHECK(layout.tickets - layout.turns >= (deterministic ? turns * 4 : 0));
      CHECK(layout.key_list - layout.tickets == (is_persistent(plan.config) ? 128 : 0));
      const std::uint64_t list = args.packed ? key_list_bytes(plan.max_key_entries) : 0;
      CHECK(layout.bytes - layout.key_list >= list);
      CHECK(layout.bytes <= rows * 4 * (row.key.head_dim + 2) + turns * 4 + list + 6 * 128);
      for (std::uint64_t at : {layout.lse_log2, layout.delta, layout.turns, layout.tickets,
                               layout.key_list, layout.bytes}) {
        CHECK(at % 128 == 0);
      }
    }
  }
  Args args = valid_args();
  args.batch = 0;
  check::context = "nothing";
  CHECK(workspace_layout(plan_of(args), false, true).bytes == 0);
  check::context = "beyond 32 bits";
  args = valid_args();
  args.seqlen_q = 1 << 20;
  args.heads = 64;
  CHECK(workspace_layout(plan_of(args), false, false).bytes > 2ull * 64 * (1 << 20) * 128 * 4);
}

}  // namespace

int main() {
  shapes_are_refused_by_name_and_value();
  tensors_are_refused_by_name();
  lengths_are_refused_by_name();
  what_is_never_touched_is_not_checked();
  scores_are_scaled_as_in_the_forward_pass();
  groups_of_heads_are_large_enough();
  grids_count_the_blocks_of_queries_and_keys();
  packed_grids_have_room_for_every_sequence();
  clusters_are_whole();
  too_many_tiles_are_refused();
  the_workspace_is_dq_and_two_numbers_a_row();
  return check::result();
}
