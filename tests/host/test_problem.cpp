// hopper/forward/problem.cpp: refusals name the field and its value; plans are what was asked.
#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "forward/problem.h"
#include "hopper_attention/budget.h"
#include "instances.h"
#include "small_problem.h"

namespace {

using namespace hopper_attention;

using Args = hopper_attention_forward_args;

Args valid_args() { return small_problem<Args>(); }

template <class Change>
void refuses(const char* text, hopper_attention_status code, Change change) {
  Args args = valid_args();
  change(args);
  check_refused(check_forward_shape(args), text, code);
}

void shapes_are_refused_by_name_and_value() {
  const auto invalid = HOPPER_ATTENTION_INVALID_ARGUMENT;
  refuses("dtype is 3", invalid, [](Args& a) { a.dtype = 3; });
  refuses("dtype is -1", invalid, [](Args& a) { a.dtype = -1; });
  refuses("batch is -3", invalid, [](Args& a) { a.batch = -3; });
  refuses("seqlen_q is -1", invalid, [](Args& a) { a.seqlen_q = -1; });
  refuses("seqlen_k is 1073741824", invalid, [](Args& a) { a.seqlen_k = 1 << 30; });
  refuses("heads is -8", invalid, [](Args& a) { a.heads = -8; });
  refuses("heads_kv is 3", invalid, [](Args& a) { a.heads_kv = 3; });
  refuses("heads_kv is 0", invalid, [](Args& a) { a.heads_kv = 0; });
  refuses("head_dim is 0", invalid, [](Args& a) { a.head_dim = 0; });
  refuses("head_dim is 264", invalid, [](Args& a) { a.head_dim = 264; });
  refuses("head_dim is 100", invalid, [](Args& a) { a.head_dim = a.head_dim_v = 100; });
  refuses("head_dim_v is 36", invalid, [](Args& a) { a.head_dim_v = 36; });
  refuses("window_left is -2", invalid, [](Args& a) { a.window_left = -2; });
  refuses("window_right is -5", invalid, [](Args& a) { a.window_right = -5; });
  refuses("sm_margin is -1", invalid, [](Args& a) { a.sm_margin = -1; });
  refuses("softmax_scale", invalid, [](Args& a) { a.softmax_scale = std::nanf(""); });
  refuses("softmax_scale", invalid, [](Args& a) { a.softmax_scale = -HUGE_VALF; });
  refuses("softcap is -1", invalid, [](Args& a) { a.softcap = -1.0f; });
  refuses("softcap", invalid, [](Args& a) { a.softcap = HUGE_VALF; });
  const auto unsupported = HOPPER_ATTENTION_NOT_SUPPORTED;
  refuses("head_dim_v is 136", unsupported, [](Args& a) { a.head_dim_v = 136; });
  refuses("head_dim is 256", unsupported, [](Args& a) { a.head_dim = 256; });
  refuses("packed is 2", invalid, [](Args& a) { a.packed = 2; });
  refuses("batch is 1073741824", invalid, [](Args& a) { a.packed = 1, a.batch = 1 << 30; });
  refuses("not e4m3", unsupported, [](Args& a) { a.packed = 1, a.dtype = 2; });
  static const std::int32_t lengths[3] = {};
  refuses("packed is 0", invalid, [](Args& a) { a.cu_seqlens_q = lengths; });
  refuses("packed is 0", invalid, [](Args& a) { a.seqused_k = lengths; });
}

// Every multiple of 8 up to 256, and every mixed pair that abi.h allows, has a row.
void every_allowed_head_dim_finds_an_instance() {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (int head_dim_v = 8; head_dim_v <= 256; head_dim_v += 8) {
      Args args = valid_args();
      args.head_dim = head_dim;
      args.head_dim_v = head_dim_v;
      check::context = std::to_string(head_dim) + ", " + std::to_string(head_dim_v);
      const bool allowed = head_dim_v == head_dim || (head_dim <= 192 && head_dim_v <= 128);
      CHECK(check_forward_shape(args).ok() == allowed);
      if (!allowed) continue;
      ForwardPlan plan;
      CHECK(plan_forward(args, 132, &plan).ok());
      CHECK(plan.key.head_dim >= head_dim && plan.key.head_dim_v >= head_dim_v);
      int rows = 0;
      for (const InstanceRow& row : kInstanceRows) rows += row.key == plan.key;
      CHECK(rows == 1);
    }
  }
}

// A tensor with room for all strides; its address is only looked at.
struct Tensors {
  alignas(16) char q[32], k[32], v[32], out[32], workspace[16];
};

Args valid_tensors(Tensors& tensors) {
  Args args = valid_args();
  args.q = tensors.q;
  args.k = tensors.k;
  args.v = tensors.v;
  args.out = tensors.out;
  args.workspace = tensors.workspace;
  args.q_stride_batch = args.out_stride_batch = 300 * 8 * 128;
  args.q_stride_seq = args.out_stride_seq = 8 * 128;
  args.k_stride_batch = args.v_stride_batch = 500 * 2 * 128;
  args.k_stride_seq = args.v_stride_seq = 2 * 128;
  args.q_stride_head = args.k_stride_head = args.v_stride_head = args.out_stride_head = 128;
  return args;
}

template <class Change>
void refuses_tensor(const char* text, Change change) {
  Tensors tensors;
  Args args = valid_tensors(tensors);
  check::context = "unchanged";
  CHECK(check_forward_tensors(args).ok());
  change(args);
  check_refused(check_forward_tensors(args), text, HOPPER_ATTENTION_INVALID_ARGUMENT);
}

void tensors_are_refused_by_name() {
  refuses_tensor("q is null", [](Args& a) { a.q = nullptr; });
  refuses_tensor("k is null", [](Args& a) { a.k = nullptr; });
  refuses_tensor("v is null", [](Args& a) { a.v = nullptr; });
  refuses_tensor("out is null", [](Args& a) { a.out = nullptr; });
  refuses_tensor("workspace is null", [](Args& a) { a.workspace = nullptr; });
  refuses_tensor("sink is not aligned", [](Args& a) {
    a.sink = reinterpret_cast<const float*>(static_cast<const char*>(a.q) + 2);
  });
  refuses_tensor("v is not aligned", [](Args& a) { a.v = static_cast<const char*>(a.v) + 8; });
  refuses_tensor("q_stride_seq is 1028", [](Args& a) { a.q_stride_seq = 1028; });
  refuses_tensor("k_stride_head is -128", [](Args& a) { a.k_stride_head = -128; });
  refuses_tensor("out_stride_batch", [](Args& a) { a.out_stride_batch = std::int64_t{1} << 40; });
}

// 300 query rows and 500 keys in two sequences.
Args packed_tensors(Tensors& tensors) {
  static const std::int32_t cu_seqlens[3] = {};
  Args args = valid_tensors(tensors);
  args.packed = 1;
  args.cu_seqlens_q = args.cu_seqlens_k = cu_seqlens;
  return args;
}

template <class Change>
void refuses_packed(const char* text, Change change) {
  Tensors tensors;
  Args args = packed_tensors(tensors);
  args.q_stride_batch = 3;  // never taken
  check::context = "unchanged, packed";
  CHECK(check_forward_tensors(args).ok());
  change(args);
  check_refused(check_forward_tensors(args), text, HOPPER_ATTENTION_INVALID_ARGUMENT);
}

const std::int32_t* odd_address(const void* data) {
  return reinterpret_cast<const std::int32_t*>(static_cast<const char*>(data) + 2);
}

void tensors_of_packed_batches_are_refused_by_name() {
  refuses_packed("cu_seqlens_q is null", [](Args& a) { a.cu_seqlens_q = nullptr; });
  refuses_packed("cu_seqlens_k is null", [](Args& a) { a.cu_seqlens_k = nullptr; });
  refuses_packed("cu_seqlens_k is not", [](Args& a) { a.cu_seqlens_k = odd_address(a.q); });
  refuses_packed("seqused_q is not", [](Args& a) { a.seqused_q = odd_address(a.q); });
  refuses_packed("workspace is null or not aligned to 16",
                 [](Args& a) { a.workspace = static_cast<char*>(a.workspace) + 8; });
  refuses_packed("q_stride_seq is 1028", [](Args& a) { a.q_stride_seq = 1028; });
}

void what_is_never_read_is_not_checked() {
  Tensors tensors;
  Args args = valid_tensors(tensors);
  args.seqlen_k = 0;
  args.k = args.v = nullptr;
  check::context = "no keys";
  CHECK(check_forward_tensors(args).ok());
  args = valid_tensors(tensors);
  args.batch = 1;
  args.q_stride_batch = 3;
  check::context = "the batch stride of one batch";
  CHECK(check_forward_tensors(args).ok());
}

ForwardPlan plan_of(const Args& args, int num_sms = 132) {
  ForwardPlan plan;
  CHECK(check_forward_shape(args).ok());
  CHECK(plan_forward(args, num_sms, &plan).ok());
  return plan;
}

// P = exp2(scale_log2 * (S - max)) with the transformed S must be exp(scale * score - max).
void plain_scores_take_the_kernel_without_a_mask() {
  check::context = "plain";
  Args args = valid_args();
  args.head_dim = args.head_dim_v = 64;
  ForwardPlan plan = plan_of(args);
  CHECK(plan.key.mask == MaskKind::kFull && !plan.transform_scores && !plan.order.longest_first);
  args = valid_args();  // d128 may use the masked kernel's tiles, its blocks are still alike
  plan = plan_of(args);
  CHECK(plan.mask.full() && !plan.transform_scores && !plan.order.longest_first);
  CHECK(std::fabs(plan.scale_log2 - 0.088f / std::log(2.0f)) < 1e-6f);

  check::context = "no keys";  // every tile of a kernel without a mask has some
  args.head_dim = args.head_dim_v = 256;
  args.seqlen_k = 1;
  CHECK(plan_of(args).key.mask == MaskKind::kFull);
  args.seqlen_k = 0;
  CHECK(plan_of(args).key.mask == MaskKind::kMasked);
  args = valid_args();

  check::context = "causal";
  args.causal = 1;
  plan = plan_of(args);
  CHECK(plan.key.mask == MaskKind::kMasked && !plan.transform_scores && plan.order.longest_first);

  for (const auto& [seqlen, left, mask] : {std::tuple{1024, -1, MaskKind::kShort},
                                           {1025, -1, MaskKind::kMasked},
                                           {5000, 1023, MaskKind::kShort},
                                           {5000, 1024, MaskKind::kMasked}}) {
    check::context = "d64, window " + std::to_string(left) + " of " + std::to_string(seqlen);
    args = valid_args();
    args.head_dim = args.head_dim_v = 64;
    args.seqlen_q = args.seqlen_k = seqlen;
    args.causal = 1;
    args.window_left = left;
    CHECK(plan_of(args).key.mask == mask);
    args.causal = 0;
    args.window_left = -1;
    CHECK(plan_of(args).key.mask == MaskKind::kFull);
  }

  check::context = "softcap";
  args = valid_args();
  args.softcap = 20.0f;
  plan = plan_of(args);
  CHECK(plan.key.mask == MaskKind::kMasked && plan.transform_scores && plan.cap == 20.0f);
  CHECK(std::fabs(plan.inner_scale - 0.088f / 20.0f) < 1e-8f);
  CHECK(std::fabs(plan.scale_log2 - 1.0f / std::log(2.0f)) < 1e-6f);

  for (float scale : {0.0f, -0.5f}) {
    check::context = "softmax_scale " + std::to_string(scale);
    args = valid_args();
    args.softmax_scale = scale;
    plan = plan_of(args);
    CHECK(plan.key.mask == MaskKind::kMasked && plan.transform_scores);
    CHECK(plan.inner_scale == scale && plan.cap == 0.0f);
  }
}

void the_grid_is_the_device_less_the_margin_or_the_tiles() {
  Args args = valid_args();
  args.seqlen_q = 1 << 15;
  check::context = "large";
  CHECK(plan_of(args, 132).grid == 132);
  CHECK(plan_of(args, 114).grid == 114);
  args.sm_margin = 32;
  CHECK(plan_of(args, 132).grid == 100);
  args.sm_margin = INT_MAX;
  CHECK(plan_of(args, 132).grid == 1);
  check::context = "small";
  args = valid_args();
  args.batch = args.heads = args.heads_kv = 1;
  const ForwardPlan plan = plan_of(args, 132);
  CHECK(plan.grid == plan.order.num_tiles());
  CHECK(plan.grid == (300 + plan.config.tile_m() - 1) / plan.config.tile_m());
}

// Tiles that the busiest block has, one after the other.
int rounds(const ForwardPlan& plan) {
  std::vector<int> tiles(plan.grid, 0);
  for (int block = 0; block < plan.grid; ++block) {
    for (int i = block / plan.cluster; i < plan.order.num_tiles(); i += plan.grid / plan.cluster) {
      ++tiles[block];
    }
  }
  return *std::max_element(tiles.begin(), tiles.end());
}

void blocks_share_loads_where_no_tile_has_to_wait_for_it() {
  Args args = valid_args();
  args.head_dim = args.head_dim_v = 256;
  args.seqlen_k = kClusterKeys;
  bool alone = false, together = false;
  for (int num_sms : {1, 2, 7, 16, 78, 114, 132}) {
    for (int heads : {1, 3, 8, 40, 132}) {
      for (int seqlen : {1, 128, 129, 300, 385, 512, 640, 1281, 4096}) {
        check::context = std::to_string(num_sms) + " multiprocessors, " + std::to_string(heads) +
                         " heads, " + std::to_string(seqlen) + " rows";
        args.heads = args.heads_kv = heads;
        args.seqlen_q = seqlen;
        const ForwardPlan plan = plan_of(args, num_sms);
        const int m_blocks = (seqlen + 127) / 128, tiles = m_blocks * heads * args.batch;
        CHECK(plan.config.cluster == 2 && plan.num_tiles == tiles);
        CHECK(plan.cluster == 1 || plan.cluster == 2);
        CHECK(plan.grid >= 1 && plan.grid <= num_sms && plan.grid % plan.cluster == 0);
        CHECK(plan.order.num_tiles() * plan.cluster >= tiles);
        CHECK(rounds(plan) == (tiles + num_sms - 1) / num_sms);
        const bool even = m_blocks % 2 == 0 && num_sms % 2 == 0;
        if (even) CHECK(plan.cluster == 2);
        if (m_blocks == 1 || num_sms == 1) CHECK(plan.cluster == 1);
        (plan.cluster == 1 ? alone : together) = true;
        args.sm_margin = 2;
        CHECK(plan_of(args, num_sms).cluster == 1);
        args.sm_margin = 0;
      }
    }
  }
  check::context = "both kinds";
  CHECK(alone && together);
  check::context = "few keys";
  args.seqlen_q = 4096;
  CHECK(plan_of(args).cluster == 2);
  args.seqlen_k = kClusterKeys - 1;
  CHECK(plan_of(args).cluster == 1);
  check::context = "with a mask";
  args.seqlen_k = 4096;
  args.causal = 1;
  CHECK(plan_of(args).cluster == 1);
}

void packed_batches_have_kernels_of_their_own() {
  Args args = valid_args();
  args.packed = 1;
  for (int causal : {0, 1}) {
    for (int batch : {0, 2, 1000}) {
      check::context = "packed, " + std::to_string(batch) + " sequences";
      args.causal = causal;
      args.batch = batch;
      const ForwardPlan plan = plan_of(args);
      CHECK(plan.key.mask == MaskKind::kPacked);
      CHECK(plan.mask.seqlen_q == 300 && plan.mask.seqlen_k == 500);
      CHECK(plan.mask.full() == (causal == 0));
      // Each sequence, and what lies behind the last one, may end in a tile of its own.
      CHECK(plan.num_tiles == (300 / plan.config.tile_m() + batch + 1) * args.heads);
      CHECK(plan.grid == std::min(132, plan.num_tiles));
      CHECK(plan.packed_order.heads == args.heads);
    }
  }
}

void too_many_tiles_are_refused() {
  Args args = valid_args();
  args.seqlen_q = kMaxLength;
  args.batch = 1 << 16;
  ForwardPlan plan;
  for (int packed : {0, 1}) {
    args.packed = packed;
    args.heads = args.heads_kv = packed ? 1 << 8 : 8;
    const Status status = plan_forward(args, 132, &plan);
    check::context = status.message;
    CHECK(status.code == HOPPER_ATTENTION_INVALID_ARGUMENT);
    CHECK(status.message.find("seqlen_q") != std::string::npos);
  }
}

}  // namespace

int main() {
  shapes_are_refused_by_name_and_value();
  every_allowed_head_dim_finds_an_instance();
  tensors_are_refused_by_name();
  tensors_of_packed_batches_are_refused_by_name();
  what_is_never_read_is_not_checked();
  plain_scores_take_the_kernel_without_a_mask();
  the_grid_is_the_device_less_the_margin_or_the_tiles();
  blocks_share_loads_where_no_tile_has_to_wait_for_it();
  packed_batches_have_kernels_of_their_own();
  too_many_tiles_are_refused();
  return check::result();
}
