// How a C++ program calls the library. Attention with Q = 0 weighs all keys alike, so every output
// is the mean of V's column; the program checks that.
//
//   g++ -std=c++17 abi_example.cpp -lhopper_attention -lcudart -o abi_example
//
// Exits with 0 when the output is right, 1 when something failed, 77 when there is no Hopper card.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "hopper_attention/abi.h"

namespace {

constexpr int kBatch = 2, kSeqlen = 333, kHeads = 4, kHeadsKv = 2, kHeadDim = 128;

// bfloat16 is the upper half of a float.
std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<std::uint16_t>(bits >> 16);
}
float from_bfloat16(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Device memory filled with zeros, freed at the end of its scope; null where CUDA refuses.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) {
    if (cudaMalloc(&data_, bytes) != cudaSuccess) data_ = nullptr;
    if (data_ != nullptr) cudaMemset(data_, 0, bytes);
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

// A call on contiguous (batch, seqlen, heads, head_dim) tensors, without its pointers.
hopper_attention_forward_args describe() {
  hopper_attention_forward_args args{};
  args.struct_size = sizeof(args);
  args.dtype = HOPPER_ATTENTION_BFLOAT16;
  args.batch = kBatch;
  args.seqlen_q = args.seqlen_k = kSeqlen;
  args.heads = kHeads;
  args.heads_kv = kHeadsKv;
  args.head_dim = args.head_dim_v = kHeadDim;
  args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  args.window_left = args.window_right = -1;
  args.q_stride_head = args.k_stride_head = args.v_stride_head = args.out_stride_head = kHeadDim;
  args.q_stride_seq = args.out_stride_seq = kHeads * kHeadDim;
  args.k_stride_seq = args.v_stride_seq = kHeadsKv * kHeadDim;
  args.q_stride_batch = args.out_stride_batch = kSeqlen * args.q_stride_seq;
  args.k_stride_batch = args.v_stride_batch = kSeqlen * args.k_stride_seq;
  return args;
}

int fail(const char* what) {
  std::fprintf(stderr, "%s: %s\n", what, hopper_attention_last_error());
  return 1;
}

// V holds the key's index modulo 4 in every column: 333 keys have the mean (83 * 6 + 0) / 333.
int check_output(const DeviceBuffer& out) {
  std::vector<std::uint16_t> host(std::size_t{kBatch} * kSeqlen * kHeads * kHeadDim);
  const auto bytes = host.size() * sizeof(host[0]);
  if (cudaMemcpy(host.data(), out.get(), bytes, cudaMemcpyDeviceToHost) != cudaSuccess) return 1;
  const float expected = 83.0f * 6.0f / kSeqlen;
  for (std::uint16_t value : host) {
    if (!(std::fabs(from_bfloat16(value) - expected) < 0.01f)) {
      std::fprintf(stderr, "out has %g where %g is right\n", from_bfloat16(value), expected);
      return 1;
    }
  }
  std::printf("every output is %g, as it should be\n", from_bfloat16(host[0]));
  return 0;
}

}  // namespace

int main() {
  hopper_attention_forward_args args = describe();

  char json[2048];
  if (hopper_attention_explain_forward(&args, json, sizeof(json)) != HOPPER_ATTENTION_OK) {
    return fail("explain");
  }
  std::printf("hopper-attention %s would run %s\n", hopper_attention_version(), json);

  std::vector<std::uint16_t> values(std::size_t{kBatch} * kSeqlen * kHeadsKv * kHeadDim);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t key = i / (kHeadsKv * kHeadDim) % kSeqlen;
    values[i] = to_bfloat16(static_cast<float>(key % 4));
  }
  const std::size_t q_bytes = std::size_t{kBatch} * kSeqlen * kHeads * kHeadDim * 2;
  const std::size_t kv_bytes = values.size() * 2;
  const DeviceBuffer q(q_bytes), k(kv_bytes), v(kv_bytes), out(q_bytes);
  const DeviceBuffer workspace(hopper_attention_forward_workspace_bytes());
  if (workspace.get() == nullptr) {
    std::printf("no CUDA device: nothing was run\n");
    return 77;
  }
  cudaMemcpy(v.get(), values.data(), kv_bytes, cudaMemcpyHostToDevice);

  args.q = q.get();
  args.k = k.get();
  args.v = v.get();
  args.out = out.get();
  args.workspace = workspace.get();
  const hopper_attention_status status = hopper_attention_forward(&args);
  if (status == HOPPER_ATTENTION_WRONG_DEVICE) {
    std::printf("%s\n", hopper_attention_last_error());
    return 77;
  }
  if (status != HOPPER_ATTENTION_OK) return fail("forward");
  return check_output(out);
}
