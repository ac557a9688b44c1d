// The compiled library through its C interface, on a machine that shows no device: what it says,
// and that nothing worse than a status code comes of bad arguments.
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"
#include "hopper_attention/abi.h"

namespace {

struct Call {
  alignas(16) char memory[64] = {};
  hopper_attention_forward_args args{};

  Call() {
    args.struct_size = sizeof(args);
    args.q = args.k = args.v = args.out = args.workspace = memory;
    args.dtype = HOPPER_ATTENTION_BFLOAT16;
    args.batch = args.heads = args.heads_kv = 1;
    args.seqlen_q = args.seqlen_k = 1;
    args.head_dim = args.head_dim_v = 128;
    args.softmax_scale = 1.0f;
    args.window_left = args.window_right = -1;
  }
};

bool mentions(const char* word) {
  check::context = std::string("\"") + word + "\" in: " + hopper_attention_last_error();
  return std::strstr(hopper_attention_last_error(), word) != nullptr;
}

void forward_without_a_device_says_so() {
  Call call;
  check::context = "no device";
  CHECK(hopper_attention_forward(&call.args) == HOPPER_ATTENTION_WRONG_DEVICE);
  CHECK(mentions("device") || mentions("driver"));
}

void bad_arguments_are_named() {
  check::context = "bad arguments";
  CHECK(hopper_attention_forward(nullptr) == HOPPER_ATTENTION_INVALID_ARGUMENT);
  CHECK(mentions("args is null"));
  Call call;
  call.args.head_dim = 12;
  CHECK(hopper_attention_forward(&call.args) == HOPPER_ATTENTION_INVALID_ARGUMENT);
  CHECK(mentions("head_dim is 12"));
  Call sized;
  sized.args.struct_size = sizeof(sized.args) + 8;
  CHECK(hopper_attention_forward(&sized.args) == HOPPER_ATTENTION_INVALID_ARGUMENT);
  CHECK(mentions("struct_size"));
}

// Programs built before sinks, or packed batches' gradients, were added pass shorter structs.
void older_callers_keep_working() {
  Call call;
  call.args.struct_size = offsetof(hopper_attention_forward_args, sink);
  std::string text(2048, '?');
  check::context = "a forward struct without a sink";
  CHECK(hopper_attention_explain_forward(&call.args, text.data(), text.size()) ==
        HOPPER_ATTENTION_OK);
  hopper_attention_backward_args args{};
  args.struct_size = offsetof(hopper_attention_backward_args, sink);
  args.batch = args.heads = args.heads_kv = 1;
  args.head_dim = args.head_dim_v = 64;
  uint64_t bytes = 0;
  check::context = "a backward struct without a sink";
  CHECK(hopper_attention_backward_workspace_bytes(&args, &bytes) == HOPPER_ATTENTION_OK);
  args.struct_size = offsetof(hopper_attention_backward_args, packed);
  check::context = "a backward struct without packed batches";
  CHECK(hopper_attention_backward_workspace_bytes(&args, &bytes) == HOPPER_ATTENTION_OK);
}

void explain_writes_json_and_respects_the_buffer() {
  Call call;
  call.args.head_dim = call.args.head_dim_v = 64;
  std::string text(2048, '?');
  check::context = "explain";
  CHECK(hopper_attention_explain_forward(&call.args, text.data(), text.size()) ==
        HOPPER_ATTENTION_OK);
  text.resize(std::strlen(text.c_str()));
  check::context = text;
  CHECK(text.size() > 2 && text.front() == '{' && text.back() == '}');
  CHECK(text.find("\"instance\": \"bf16_d64_full\"") != std::string::npos);

  char small[8];
  std::memset(small, '#', sizeof(small));
  CHECK(hopper_attention_explain_forward(&call.args, small, 4) == HOPPER_ATTENTION_OK);
  CHECK(std::string(small) == text.substr(0, 3));
  CHECK(small[4] == '#');
  CHECK(hopper_attention_explain_forward(&call.args, nullptr, 0) ==
        HOPPER_ATTENTION_INVALID_ARGUMENT);
}

void packed_batches_say_what_they_need() {
  check::context = "packed";
  CHECK(hopper_attention_packed_workspace_bytes(-1, 1) == 0);
  CHECK(hopper_attention_packed_workspace_bytes(1, -1) == 0);
  const size_t bytes = hopper_attention_packed_workspace_bytes(1000, 7);
  CHECK(bytes > 0 && bytes <= 32 * (1000 / 128 + 7) + 4608);
  Call call;
  call.args.packed = 1;
  std::string text(2048, '?');
  CHECK(hopper_attention_explain_forward(&call.args, text.data(), text.size()) ==
        HOPPER_ATTENTION_OK);
  check::context = text.c_str();
  CHECK(text.find("\"instance\": \"bf16_d128_packed\"") != std::string::npos);
  call.args.dtype = HOPPER_ATTENTION_E4M3;
  CHECK(hopper_attention_forward(&call.args) == HOPPER_ATTENTION_NOT_SUPPORTED);
  CHECK(mentions("packed"));
}

void the_quantizer_speaks_the_same_language() {
  hopper_attention_quantize_args args{};
  args.struct_size = sizeof(args);
  args.batch = args.heads = args.heads_kv = 1;
  args.head_dim = args.head_dim_v = 64;
  check::context = "quantize";
  CHECK(hopper_attention_quantize_workspace_bytes(&args) > 0);
  CHECK(hopper_attention_quantize(&args) == HOPPER_ATTENTION_WRONG_DEVICE);
  CHECK(mentions("device") || mentions("driver"));
  args.head_dim = 12;
  CHECK(hopper_attention_quantize(&args) == HOPPER_ATTENTION_INVALID_ARGUMENT);
  CHECK(mentions("head_dim is 12"));
  CHECK(hopper_attention_quantize_workspace_bytes(&args) == 0);
  CHECK(hopper_attention_quantize(nullptr) == HOPPER_ATTENTION_INVALID_ARGUMENT);
}

void the_backward_pass_speaks_the_same_language() {
  hopper_attention_backward_args args{};
  args.struct_size = sizeof(args);
  args.batch = args.heads = args.heads_kv = 1;
  args.seqlen_q = args.seqlen_k = 100;
  args.head_dim = args.head_dim_v = 64;
  check::context = "backward";
  uint64_t bytes = 0, fixed_order_bytes = 0;
  CHECK(hopper_attention_backward_workspace_bytes(&args, &bytes) == HOPPER_ATTENTION_OK);
  CHECK(bytes >= 100 * (64 + 2) * sizeof(float));
  CHECK(hopper_attention_backward_workspace_bytes(&args, nullptr) ==
        HOPPER_ATTENTION_INVALID_ARGUMENT);
  CHECK(mentions("bytes is null"));
  CHECK(hopper_attention_backward(&args) == HOPPER_ATTENTION_WRONG_DEVICE);
  CHECK(mentions("device") || mentions("driver"));
  args.deterministic = 1;
  CHECK(hopper_attention_backward_workspace_bytes(&args, &fixed_order_bytes) ==
        HOPPER_ATTENTION_OK);
  CHECK(fixed_order_bytes > bytes);
  args.packed = 1;
  args.batch = 40;  // each sequence may begin a block of its own
  CHECK(hopper_attention_backward_workspace_bytes(&args, &bytes) == HOPPER_ATTENTION_OK);
  CHECK(bytes >= 40 * 128 * (64 + 2) * sizeof(float));
  args.packed = 0;
  args.cu_seqlens_q = &args.dtype;
  CHECK(hopper_attention_backward(&args) == HOPPER_ATTENTION_INVALID_ARGUMENT);
  CHECK(mentions("packed is 0"));
  args.cu_seqlens_q = nullptr;
  args.head_dim = 12;
  CHECK(hopper_attention_backward(&args) == HOPPER_ATTENTION_INVALID_ARGUMENT);
  CHECK(mentions("head_dim is 12"));
  CHECK(hopper_attention_backward(nullptr) == HOPPER_ATTENTION_INVALID_ARGUMENT);
}

void it_knows_what_it_is() {
  check::context = "identity";
  CHECK(std::string(hopper_attention_version()) == EXPECTED_VERSION);
  const std::string names =
      std::string(hopper_attention_instances()) + hopper_attention_backward_instances();
  CHECK(!names.empty());
  CHECK(hopper_attention_forward_workspace_bytes() > 0);
}

}  // namespace

int main() {
  setenv("CUDA_VISIBLE_DEVICES", "", 1);  // a device that is there must not be used
  forward_without_a_device_says_so();
  bad_arguments_are_named();
  older_callers_keep_working();
  explain_writes_json_and_respects_the_buffer();
  packed_batches_say_what_they_need();
  the_quantizer_speaks_the_same_language();
  the_backward_pass_speaks_the_same_language();
  it_knows_what_it_is();
  return check::result();
}
