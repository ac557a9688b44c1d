// The quantizer's geometry and checks, against brute force.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "quantize_call.h"

namespace {

using namespace hopper_attention;

void fast_division_is_division() {
  check::context = "division";
  std::mt19937 random(1);
  const auto test = [](std::int32_t n, std::int32_t by) {
    if (FastDivide(by).quotient(n) != n / by) {
      check::context = std::to_string(n) + " / " + std::to_string(by);
      CHECK(false);
    }
  };
  for (std::int32_t by = 1; by < 300; ++by) {
    for (std::int32_t n = 0; n < 1000; ++n) test(n, by);
  }
  constexpr std::int32_t kMost = 2147483647;
  for (int i = 0; i < 300000; ++i) {
    const auto by = static_cast<std::int32_t>(random() >> (1 + random() % 31)) | 1;
    const std::int32_t even = by < kMost ? by + 1 : by;
    const auto n = static_cast<std::int32_t>(random() >> 1);
    for (std::int32_t d : {by, even}) {
      test(n, d);
      test(kMost, d);
      const std::int32_t multiple = n / d * d;
      test(multiple, d);
      if (multiple > 0) test(multiple - 1, d);
    }
  }
  for (int bit = 0; bit < 31; ++bit) {
    for (std::int32_t d : {1 << bit, (1 << bit) - (bit > 0), (1 << bit) + (bit > 0)}) {
      test(kMost, d), test(kMost - 1, d), test(d, d), test(d - 1, d);
    }
  }
  check::context = "default";
  CHECK(FastDivide(7).quotient(48) == 6);
}

void hadamard_blocks() {
  check::context = "Hadamard blocks";
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    int largest = 1;
    for (int block = 1; block <= head_dim; block *= 2) {
      if (head_dim % block == 0) largest = block;
    }
    CHECK(1 << hadamard_log2(head_dim) == largest);
  }
  CHECK(hadamard_log2(96) == 5 && hadamard_log2(192) == 6 && hadamard_log2(72) == 3);
}

void slots_of_packed_sequences() {
  check::context = "slots";
  std::mt19937 random(2);
  for (int round = 0; round < 2000; ++round) {
    const int batch = 1 + random() % 9;
    std::int64_t begin = 0, free_slot = 0;
    for (int i = 0; i < batch; ++i) {
      const std::int64_t length = random() % 4 == 0 ? 0 : random() % 500;
      const std::int64_t first = first_slot(begin, i);
      CHECK(first >= free_slot);
      free_slot = first + std::max<std::int64_t>(1, (length + 127) / 128);
      begin += length;
    }
    CHECK(free_slot <= quantize_slots(begin, batch, true));
  }
  CHECK(quantize_slots(0, 3, false) == 0 && quantize_slots(129, 3, false) == 2);
}

void wrong_arguments_are_named() {
  check::context = "a good call";
  CHECK(Call().status().ok());
  CHECK(with([](auto& a) { a.dtype = HOPPER_ATTENTION_E4M3; }).refused("dtype is 2"));
  CHECK(with([](auto& a) { a.batch = -1; }).refused("batch is -1"));
  CHECK(with([](auto& a) { a.batch = a.heads = 1 << 20; }).refused("batch times heads"));
  CHECK(with([](auto& a) { a.head_dim = 12; }).refused("head_dim is 12"));
  CHECK(with([](auto& a) { a.head_dim_v = 264; }).refused("head_dim_v is 264"));
  CHECK(with([](auto& a) { a.qk_scale = 4; }).refused("qk_scale is 4"));
  CHECK(with([](auto& a) { a.v_scale = 2; }).refused("v_scale is 2"));
  CHECK(with([](auto& a) { a.q = nullptr; }).refused("q is null"));
  CHECK(with([](auto& a) { a.v_descale = nullptr; }).refused("v_descale is null"));
  CHECK(with([](auto& a) { a.workspace = nullptr; }).refused("workspace is null"));
  CHECK(with([](auto& a) { a.smooth_k = 1; }).refused("k_mean is null"));
  CHECK(with([](auto& a) { a.v_scale = 3; }).refused("v_token_factor is null"));
  CHECK(with([](auto& a) { a.k_stride_seq = -8; }).refused("k_stride_seq is -8"));
  CHECK(with([](auto& a) { a.v_out_stride_seq = 8; }).refused("v_out_stride_seq is 8"));
  CHECK(with([](auto& a) { a.q_out = static_cast<char*>(a.q_out) + 8; }).refused("q_out is"));
  CHECK(with([](auto& a) {
          a.cu_seqlens_q = reinterpret_cast<const std::int32_t*>(a.q);
        }).refused("cu_seqlens_q and cu_seqlens_k"));
}

void wrong_rotary_is_named() {
  const auto rotary = [](auto change) {
    return with([&](auto& a) {
      a.rotary_cos = a.rotary_sin = static_cast<const float*>(a.q);
      a.rotary_dim = 64;
      a.rotary_max_len = 300;
      change(a);
    });
  };
  check::context = "a good rotary call";
  CHECK(rotary([](auto&) {}).status().ok());
  CHECK(rotary([](auto& a) { a.rotary_dim = 24; }).refused("rotary_dim is 24"));
  CHECK(rotary([](auto& a) { a.rotary_dim = 144; }).refused("rotary_dim is 144"));
  CHECK(rotary([](auto& a) { a.rotary_sin = nullptr; }).refused("both be given"));
  CHECK(rotary([](auto& a) { a.rotary_k_offset = 1ll << 41; }).refused("beyond 2^40"));
  CHECK(rotary([](auto& a) { a.rotary_q_aligned = 1, a.heads_kv = 0; }).refused("needs k"));
}

void plans() {
  QuantizePlan plan;
  Call call;
  check::context = "plan";
  CHECK(plan_quantize(call.args, &plan).ok());
  CHECK(plan.tile == 128);
  CHECK(plan.params.tensors[kQ].order.num_tiles == 2 * 4 * 1);
  CHECK(plan.params.tensors[kK].order.num_tiles == 2 * 2 * 3);
  schedule_quantize({100, 1, 1}, &plan);
  CHECK(plan.params.schedule.num_tickets == 8 + 12 + 2 * 12);
  CHECK(plan.params.tensors[kV].find_amax && !plan.params.tensors[kQ].find_amax);
  CHECK(plan.params.tensors[kQ].aligned);

  call.args.q_stride_seq = 1 << 10 | 4;
  call.args.qk_scale = HOPPER_ATTENTION_SCALE_HEAD;
  call.args.smooth_k = 1;
  call.args.head_dim_v = 136;
  call.args.hadamard = 1;
  call.args.head_dim = 96;
  std::memset(call.args.sign_bits, 0xff, sizeof(call.args.sign_bits));
  CHECK(plan_quantize(call.args, &plan).ok());
  CHECK(plan.tile == 256);
  schedule_quantize({100, 1, 1}, &plan);
  CHECK(plan.params.schedule.num_tickets == 2 * (8 + 12 + 12));
  CHECK(!plan.params.tensors[kQ].aligned && plan.params.tensors[kK].aligned);
  CHECK(plan.params.hadamard_log2 == 5);
  CHECK(plan.params.hadamard_scale == static_cast<float>(1.0 / std::sqrt(32.0)));
  CHECK(plan.params.sign_bits[2] == 0xffffffffu && plan.params.sign_bits[3] == 0);

  // The stride of a single token is never taken.
  call.args.seqlen_q = 1;
  CHECK(plan_quantize(call.args, &plan).ok() && plan.params.tensors[kQ].aligned);

  call.args.seqlen_k = call.args.seqlen_q = 1 << 29;
  call.args.heads = call.args.heads_kv = 1 << 12;
  const Status status = plan_quantize(call.args, &plan);
  check::context = status.message;
  CHECK(status.message.find("more than 2^29 blocks") != std::string::npos);
}

// The parts of the workspace lie apart, each where it is needed, and the last ends where it ends.
void workspace(const QuantizeExtent& of) {
  check::context = "workspace, scales " + std::to_string(static_cast<int>(of.qk_scale)) + " and " +
                   std::to_string(static_cast<int>(of.v_scale)) + (of.smooth_k ? ", smooth" : "") +
                   (of.packed ? ", packed" : "");
  const QuantizeWorkspace w = quantize_workspace(of);
  struct Part {
    std::int64_t begin, words;
  };
  std::vector<Part> parts = {{w.ticket, 1}};
  for (int which : {kV, kQ, kK}) {
    const ScaleKind scale = which == kV ? of.v_scale : of.qk_scale;
    const std::int64_t heads = which == kQ ? of.heads : of.heads_kv;
    const std::int64_t groups = of.batch * heads, slots = which == kQ ? of.slots_q : of.slots_k;
    const auto& tensor = w.tensors[which];
    CHECK(tensor.found % 2 == 0);  // of 8 bytes each
    if (scale == ScaleKind::kTensor) parts.push_back({tensor.found, 2 * kMaxQuantizeBlocks});
    if (scale == ScaleKind::kHead) {
      parts.push_back({tensor.found, 2 * (of.packed ? heads : groups) * slots});
    }
    if (scale == ScaleKind::kChannel || (which == kV && scale == ScaleKind::kToken)) {
      parts.push_back({tensor.measured, groups});
      parts.push_back({tensor.infinite, groups});
      parts.push_back({tensor.amax, scale == ScaleKind::kToken ? groups : groups * of.head_dim_v});
    }
  }
  const std::int64_t heads = (of.packed ? 1 : of.batch) * of.heads_kv;
  const std::int64_t sums = of.smooth_k ? heads * of.slots_k * of.head_dim : 0;
  std::int64_t end = 0, words = 0;
  for (const Part& part : parts) {
    CHECK(part.begin >= end && part.begin % 4 == 0);
    end = part.begin + part.words;
    words += part.words;
  }
  CHECK(w.zero_words >= end && w.zero_words % 4 == 0 && w.k_partial >= w.zero_words);
  // Nothing beside the parts but the ticket's cache line and what aligns them.
  CHECK(w.zero_words <= words + 32 + 4 * static_cast<std::int64_t>(parts.size()));
  CHECK(w.words >= w.k_partial + sums);
}

void workspaces() {
  for (bool smooth : {false, true}) {
    for (bool packed : {false, true}) {
      for (ScaleKind qk :
           {ScaleKind::kTensor, ScaleKind::kHead, ScaleKind::kBlock, ScaleKind::kToken}) {
        for (ScaleKind v :
             {ScaleKind::kTensor, ScaleKind::kHead, ScaleKind::kToken, ScaleKind::kChannel}) {
          workspace({2, 5, 3, 96, 136, 4, 7, packed, smooth, qk, v});
        }
      }
    }
  }
}

void empty_calls() {
  Call call;
  call.args.seqlen_q = call.args.seqlen_k = 0;
  call.args.q = call.args.k = call.args.v = nullptr;
  call.args.q_out = call.args.k_out = call.args.v_out = nullptr;
  check::context = "no tokens";
  CHECK(call.status().ok());
  call.args.q_descale = call.args.k_descale = nullptr;  // of no blocks
  CHECK(call.status().ok());
  call.args.qk_scale = HOPPER_ATTENTION_SCALE_HEAD;
  CHECK(call.refused("q_descale is null"));
  QuantizePlan plan;
  CHECK(plan_quantize(call.args, &plan).ok());
  CHECK(plan.params.tensors[kV].order.num_tiles == 4);  // a tile each writes the scales
  call.args.heads_kv = 0;
  CHECK(plan_quantize(call.args, &plan).ok());
  CHECK(plan.params.tensors[kV].order.num_tiles == 0);
  CHECK(plan.params.tensors[kQ].order.num_tiles == 8);
}

}  // namespace

int main() {
  fast_division_is_division();
  hadamard_blocks();
  slots_of_packed_sequences();
  wrong_arguments_are_named();
  wrong_rotary_is_named();
  plans();
  workspaces();
  empty_calls();
  return check::result();
}
