// What is e4m3's own: the order of V's keys, the fields of a request, and what they plan.
#include <set>
#include <string>

#include "check.h"
#include "forward/problem.h"
#include "hopper_attention/budget.h"
#include "instances.h"
#include "small_problem.h"

namespace {

using namespace hopper_attention;

using Args = hopper_attention_forward_args;

constexpr int kWarp = 32;

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk32": which element a warpgroup's thread
// has in its accumulator, and in its A operand in 8 bits, of 64 rows and of 32 columns an atom.
struct Place {
  int row, column;
};

constexpr bool operator==(Place a, Place b) { return a.row == b.row && a.column == b.column; }

Place of_accumulator(int thread, int i) {
  const int lane = thread % kWarp;
  return {thread / kWarp * 16 + lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2};
}

Place of_operand(int thread, int reg, int byte) {
  const int lane = thread % kWarp;
  const int column = reg / 4 * 32 + reg / 2 % 2 * 16 + lane % 4 * 4 + byte;
  return {thread / kWarp * 16 + lane / 4 + reg % 2 * 8, column};
}

// For every slot of the operand, its key's score is in the same thread's accumulator.
void p_stays_in_the_thread_that_has_its_score() {
  constexpr int kKeys = 128;
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    std::set<int> used;
    for (int reg = 0; reg < kKeys / 32 * 4; ++reg) {
      for (int byte = 0; byte < 4; ++byte) {
        check::context = "thread " + std::to_string(thread) + ", register " + std::to_string(reg) +
                         ", byte " + std::to_string(byte);
        const Place slot = of_operand(thread, reg, byte);
        const int key = slot.column / kSlots * kSlots + key_of_slot(slot.column % kSlots);
        int found = -1;
        for (int i = 0; i < kKeys / 2; ++i) {
          if (of_accumulator(thread, i) == Place{slot.row, key}) found = i;
        }
        CHECK(found >= 0 && used.insert(found).second);
        // Neighbours stay together, so that one conversion takes two of them.
        if (byte % 2 == 1) CHECK(used.count(found - 1) == 1);
      }
    }
    CHECK(used.size() == kKeys / 2);
  }
}

// The in-kernel transposition of 32 keys of 16 channels: ldmatrix with .trans of 16-bit pairs of
// channels, two byte permutations, stmatrix.
void transposed_blocks_have_the_keys_in_their_slots() {
  struct Byte {
    int key, channel;
  };
  Byte stored[16][32];  // channel, slot
  for (int lane = 0; lane < kWarp; ++lane) {
    Byte loaded[4][4];  // register, byte
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int byte = 0; byte < 4; ++byte) {  // rows are keys; two of them a register
        loaded[matrix][byte] = {8 * matrix + lane % 4 * 2 + byte / 2, lane / 4 * 2 + byte % 2};
      }
    }
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int group = matrix / 2, odd = matrix % 2;
      for (int byte = 0; byte < 4; ++byte) {  // 0x6420 and 0x7531
        const Byte value = loaded[2 * group + byte / 2][byte % 2 * 2 + odd];
        stored[lane / 4 * 2 + odd][kSlots * group + lane % 4 * 4 + byte] = value;
      }
    }
  }
  for (int channel = 0; channel < 16; ++channel) {
    for (int slot = 0; slot < 32; ++slot) {
      check::context = "channel " + std::to_string(channel) + ", slot " + std::to_string(slot);
      CHECK(stored[channel][slot].channel == channel);
      CHECK(stored[channel][slot].key == slot / kSlots * kSlots + key_of_slot(slot % kSlots));
    }
  }
}

Args valid_args() {
  static const float scale = 1.0f;
  Args args = small_problem<Args>();
  args.dtype = HOPPER_ATTENTION_E4M3;
  args.out_dtype = HOPPER_ATTENTION_BFLOAT16;
  args.v_transposed = 1;
  args.q_descale = args.k_descale = args.v_descale = &scale;
  args.q_descale_tokens = args.k_descale_tokens = kScaleTokens;
  args.v_descale_stride_channel = 1;
  return args;
}

template <class Change>
void refuses(const char* text, hopper_attention_status code, Change change) {
  Args args = valid_args();
  check::context = "unchanged";
  CHECK(check_forward_shape(args).ok());
  change(args);
  check_refused(check_forward_shape(args), text, code);
}

void fields_are_refused_by_name_and_value() {
  const auto invalid = HOPPER_ATTENTION_INVALID_ARGUMENT;
  refuses("dtype is 3", invalid, [](Args& a) { a.dtype = 3; });
  refuses("out_dtype is 2", invalid, [](Args& a) { a.out_dtype = HOPPER_ATTENTION_E4M3; });
  refuses("out_dtype is -1", invalid, [](Args& a) { a.out_dtype = -1; });
  refuses("accumulation is 2", invalid, [](Args& a) { a.accumulation = 2; });
  refuses("v_transposed is 2", invalid, [](Args& a) { a.v_transposed = 2; });
  refuses("q_descale_per_kv is -1", invalid, [](Args& a) { a.q_descale_per_kv = -1; });
  refuses("q_descale_tokens is 64", invalid, [](Args& a) { a.q_descale_tokens = 64; });
  refuses("k_descale_tokens is 2", invalid, [](Args& a) { a.k_descale_tokens = 2; });
  refuses("v_descale_stride_channel is 2", invalid,
          [](Args& a) { a.v_descale_stride_channel = 2; });
}

// A field of e4m3's in a 16-bit request is a mistake, not something to ignore.
void sixteen_bits_have_none_of_the_fields() {
  static const float scale = 1.0f;
  const auto with = [](auto change) {
    Args args = valid_args();
    args.dtype = HOPPER_ATTENTION_FLOAT16;
    args.out_dtype = args.v_transposed = 0;
    args.q_descale = args.k_descale = args.v_descale = nullptr;
    change(args);
    return check_forward_shape(args);
  };
  const auto refuses_field = [&](const char* field, auto change) {
    const Status status = with(change);
    check::context = std::string(field) + " in float16: " + status.message;
    CHECK(status.code == HOPPER_ATTENTION_INVALID_ARGUMENT);
    CHECK(status.message.find("e4m3 alone") != std::string::npos);
  };
  check::context = "float16";
  CHECK(with([](Args&) {}).ok());
  refuses_field("out_dtype", [](Args& a) { a.out_dtype = 1; });
  refuses_field("accumulation", [](Args& a) { a.accumulation = 1; });
  refuses_field("v_transposed", [](Args& a) { a.v_transposed = 1; });
  refuses_field("q_descale", [](Args& a) { a.q_descale = &scale; });
  refuses_field("k_descale", [](Args& a) { a.k_descale = &scale; });
  refuses_field("v_descale", [](Args& a) { a.v_descale = &scale; });
  refuses_field("v_token_factor", [](Args& a) { a.v_token_factor = &scale; });
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
  args.k_stride_batch = 500 * 2 * 128;
  args.k_stride_seq = 2 * 128;
  args.v_stride_batch = 2 * 128 * 512;
  args.v_stride_head = 128 * 512;
  args.v_stride_seq = 512;  // between channels
  args.q_stride_head = args.k_stride_head = args.out_stride_head = 128;
  return args;
}

template <class Change>
Status tensors_with(Change change) {
  Tensors tensors;
  Args args = valid_tensors(tensors);
  change(args);
  const Status status = check_forward_tensors(args);
  check::context = status.message;
  return status;
}

void strides_are_multiples_of_16_elements_and_of_8_in_the_output() {
  CHECK(tensors_with([](Args&) {}).ok());
  const auto refuses_stride = [](const char* text, auto change) {
    const Status status = tensors_with(change);
    check_refused(status, text, HOPPER_ATTENTION_INVALID_ARGUMENT);
    CHECK(status.message.find(std::string("multiples of ") + (text[0] == 'o' ? "8" : "16")) !=
          std::string::npos);
  };
  refuses_stride("q_stride_head is 136", [](Args& a) { a.q_stride_head = 136; });
  refuses_stride("k_stride_seq is 264", [](Args& a) { a.k_stride_seq = 264; });
  refuses_stride("v_stride_seq is 520", [](Args& a) { a.v_stride_seq = 520; });
  refuses_stride("out_stride_seq is 1028", [](Args& a) { a.out_stride_seq = 1028; });
  CHECK(tensors_with([](Args& a) { a.out_stride_head = 136; }).ok());
  // One key has no stride in rows of tokens; transposed, V's channels still have one.
  CHECK(!tensors_with([](Args& a) { a.seqlen_k = 1, a.v_stride_seq = 3; }).ok());
  CHECK(tensors_with([](Args& a) { a.seqlen_k = 1, a.v_stride_seq = 3, a.v_transposed = 0; }).ok());
}

template <class Change>
ForwardPlan plan_with(const char* context, Change change) {
  Args args = valid_args();
  change(args);
  check::context = context;
  CHECK(check_forward_shape(args).ok());
  ForwardPlan plan{};
  CHECK(plan_forward(args, 132, &plan).ok());
  return plan;
}

void full_rows_serve_what_they_are_built_for() {
  const auto key_with = [](const char* context, auto change) {
    return plan_with(context, change).key;
  };
  static const float factor = 1.0f;
  const ForwardKey full{Dtype::kE4M3, 128, 128, MaskKind::kFull};
  const ForwardKey masked{Dtype::kE4M3, 128, 128, MaskKind::kMasked};
  const ForwardKey fast{Dtype::kE4M3Fast, 128, 128, MaskKind::kMasked};
  CHECK(key_with("transposed V", [](Args&) {}) == full);
  CHECK(key_with("few keys", [](Args& a) { a.seqlen_k = 1; }) == full);
  CHECK(key_with("no scales", [](Args& a) { a.q_descale = a.k_descale = a.v_descale = nullptr; }) ==
        full);
  CHECK(key_with("scales of queries", [](Args& a) { a.q_descale_tokens = 1; }) == full);
  CHECK(key_with("rows of V", [](Args& a) { a.v_transposed = 0; }) == masked);
  CHECK(key_with("fast", [](Args& a) { a.accumulation = 1; }) == fast);
  CHECK(key_with("scales of keys", [](Args& a) { a.k_descale_tokens = 1; }) == masked);
  CHECK(key_with("null scales of keys",
                 [](Args& a) { a.k_descale_tokens = 1, a.k_descale = nullptr; }) == full);
  CHECK(key_with("factors of V", [](Args& a) { a.v_token_factor = &factor; }) == masked);
  CHECK(key_with("causal", [](Args& a) { a.causal = 1; }) == masked);
  CHECK(key_with("window", [](Args& a) { a.window_left = 5; }) == masked);
  CHECK(key_with("soft cap", [](Args& a) { a.softcap = 5.0f; }) == masked);
  CHECK(key_with("scale 0", [](Args& a) { a.softmax_scale = 0.0f; }) == masked);
}

// Scales of keys are in the scores before the maximum is taken; rows of V change nothing there.
void scores_are_transformed_where_a_key_has_a_factor() {
  static const float factor = 1.0f;
  const auto transforms = [](auto change) {
    return plan_with("transform_scores", change).transform_scores;
  };
  CHECK(!transforms([](Args&) {}));
  CHECK(!transforms([](Args& a) { a.v_transposed = 0; }));
  CHECK(!transforms([](Args& a) { a.accumulation = 1; }));
  CHECK(!transforms([](Args& a) { a.causal = 1; }));
  CHECK(transforms([](Args& a) { a.k_descale_tokens = 1; }));
  CHECK(transforms([](Args& a) { a.v_token_factor = &factor; }));
  CHECK(transforms([](Args& a) { a.softcap = 5.0f; }));
}

void scales_are_found_by_shifting_the_token() {
  for (int tokens : {0, 1, kScaleTokens}) {
    const ForwardPlan plan = plan_with("shifts", [&](Args& a) {
      a.q_descale_tokens = tokens;
      a.k_descale_tokens = tokens;
    });
    for (int token : {0, 1, 127, 128, 12345, kMaxLength - 1}) {
      check::context = std::to_string(tokens) + " a scale, token " + std::to_string(token);
      const int expected = tokens == 0 ? 0 : token / tokens;
      CHECK(token >> plan.scales.q_shift == expected);
      CHECK(token >> plan.scales.k_shift == expected);
    }
  }
  const ForwardPlan plan = plan_with("scales", [](Args& a) {
    a.q_descale_stride_batch = 1, a.q_descale_stride_head = 2;
    a.k_descale_stride_batch = 3, a.k_descale_stride_head = 4;
    a.v_descale_stride_batch = 5, a.v_descale_stride_head = 6;
    a.v_token_factor_stride_batch = 7, a.v_token_factor_stride_head = 8;
    a.q_descale_per_kv = 1;
  });
  const ScaleParams& s = plan.scales;
  CHECK(s.q_stride_batch == 1 && s.q_stride_head == 2 && s.q_per_kv);
  CHECK(s.k_stride_batch == 3 && s.k_stride_head == 4);
  CHECK(s.v_stride_batch == 5 && s.v_stride_head == 6 && s.v_stride_channel == 1);
  CHECK(s.v_token_stride_batch == 7 && s.v_token_stride_head == 8);
  const Args args = valid_args();
  CHECK(s.q == args.q_descale && s.k == args.k_descale && s.v == args.v_descale);
  CHECK(s.v_token_factor == nullptr);
}

// A tile of the key dimension has one scale at most, and T or the ones are where they are said.
void configs_fit_the_scales_and_the_accumulator() {
  for (const InstanceRow& row : kInstanceRows) {
    if (!is_fp8(row.key.dtype)) continue;
    check::context = row.name;
    const ForwardConfig config = make_forward_config(row.key);
    CHECK(kScaleTokens % config.tile_n == 0);
    const bool folds = row.key.dtype == Dtype::kE4M3;
    CHECK(sums_by_ones(config) == folds);
    CHECK(keeps_row_sums(config) == (sums_by_ones(config) && row.key.mask == MaskKind::kMasked));
    CHECK(may_transpose(config) == (row.key.mask == MaskKind::kMasked));
    // WGMMA's N is a multiple of 8 and at most 256, ones included.
    const int ones = sums_by_ones(config) ? kOnesRows : 0;
    const int columns = config.key.head_dim_v / config.v_parts + ones;
    CHECK(config.key.head_dim_v % config.v_parts == 0 && columns % 8 == 0 && columns <= 256);
    // The last part and the ones lie behind whole groups of 8 rows, of which swizzled V consists.
    CHECK((columns - ones) % 8 == 0);
    // A thread has a quarter of a row's exponentials, which the polynomial's share divides.
    CHECK(config.exp2_by_fma == 0 || config.tile_n / 4 % config.exp2_by_fma == 0);
    // O leaves in whole rounds, each of whole slabs, none larger than Q where it lies there.
    const int rounds = o_rounds(config);
    const int round_columns = config.key.head_dim_v / rounds;
    CHECK(round_columns * rounds == config.key.head_dim_v);
    CHECK(round_columns % slab_columns(config.key.head_dim_v, kOutputBytes) == 0);
    CHECK(!o_overlays_q(config) || round_columns * kOutputBytes <= config.key.head_dim);
    CHECK(o_overlays_q(config) || rounds == 1);
    // Where O may lie where V waits to be transposed, all consumers' O does, in whole slabs.
    if (raw_holds_o(config)) {
      CHECK(o_overlays_q(config) && may_transpose(config));
      CHECK(config.num_consumers * kConsumerRows * config.key.head_dim_v * 2 <=
            2 * config.tile_n * config.key.head_dim_v);
    }
  }
}

}  // namespace

int main() {
  p_stays_in_the_thread_that_has_its_score();
  transposed_blocks_have_the_keys_in_their_slots();
  fields_are_refused_by_name_and_value();
  sixteen_bits_have_none_of_the_fields();
  strides_are_multiples_of_16_elements_and_of_8_in_the_output();
  full_rows_serve_what_they_are_built_for();
  scores_are_transformed_where_a_key_has_a_factor();
  scales_are_found_by_shifting_the_token();
  configs_fit_the_scales_and_the_accumulator();
  return check::result();
}
