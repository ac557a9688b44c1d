// The C interface of libhopper_attention: plain structs, void pointers, status codes.
//
// Rules that hold for every entry point:
// - The caller allocates everything; the library never allocates device memory and never
//   synchronises.
// - Strides are in elements, 64 bits wide; the innermost (head dimension) stride is always 1.
// - A null pointer means "absent" where a field says it may be null, and is an error elsewhere.
// - struct_size is the caller's sizeof(struct): an older caller keeps working with a newer library.
// - No exception crosses the interface. On failure hopper_attention_last_error() holds a sentence
//   that names the field, its value and what is allowed; it is thread-local.
// - Work is enqueued on the given stream of the calling thread's current CUDA device.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HOPPER_ATTENTION_API __attribute__((visibility("default")))
#else
#define HOPPER_ATTENTION_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum hopper_attention_status {
  HOPPER_ATTENTION_OK = 0,
  HOPPER_ATTENTION_INVALID_ARGUMENT = 1,  // a field's value is wrong; the message says which
  HOPPER_ATTENTION_NOT_SUPPORTED = 2,     // a valid request that this library has no kernel for
  HOPPER_ATTENTION_NOT_COMPILED = 3,      // the instance exists but this build left it out
  HOPPER_ATTENTION_WRONG_DEVICE = 4,  // no CUDA device, no driver, or not compute capability 9.0
  HOPPER_ATTENTION_CUDA_ERROR = 5     // CUDA refused; the message carries its words
} hopper_attention_status;

typedef enum hopper_attention_dtype {
  HOPPER_ATTENTION_FLOAT16 = 0,
  HOPPER_ATTENTION_BFLOAT16 = 1,
  HOPPER_ATTENTION_E4M3 = 2  // 8 bits: 4 of exponent, 3 of mantissa; up to 448, no infinities
} hopper_attention_dtype;

// How e4m3 products are added up. Hopper's FP8 tensor cores keep about 14 bits of an accumulator.
typedef enum hopper_attention_accumulation {
  HOPPER_ATTENTION_ACCUMULATE_FP32 = 0,  // each key block apart, and the blocks in float32
  HOPPER_ATTENTION_ACCUMULATE_FAST = 1   // all of it on the tensor cores: wrong for long contexts
} hopper_attention_accumulation;

// Forward attention: O = softmax(scale * Q K^T + mask) V. Dense: one sequence length for the batch.
// Packed: sequences of any lengths, one after the other, whose lengths lie on the device.
typedef struct hopper_attention_forward_args {
  uint64_t struct_size;  // sizeof(hopper_attention_forward_args)

  const void* q;  // (batch, seqlen_q, heads, head_dim), 16-byte aligned
  const void* k;  // (batch, seqlen_k, heads_kv, head_dim), 16-byte aligned
  const void* v;  // (batch, seqlen_k, heads_kv, head_dim_v), 16-byte aligned
  void* out;      // (batch, seqlen_q, heads, head_dim_v), 16-byte aligned, written whole
  float* lse;     // (batch, heads, seqlen_q) contiguous, natural logarithm; may be null

  // Element strides of batch, sequence and head; multiples of 16 bytes (TMA's granule) or 0.
  int64_t q_stride_batch, q_stride_seq, q_stride_head;
  int64_t k_stride_batch, k_stride_seq, k_stride_head;
  int64_t v_stride_batch, v_stride_seq, v_stride_head;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;

  int32_t dtype;  // hopper_attention_dtype of q, k and v, and of out but for e4m3
  int32_t batch;
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t heads;
  int32_t heads_kv;    // divides heads
  int32_t head_dim;    // multiple of 8, 8 to 256
  int32_t head_dim_v;  // head_dim, or at most 128 where head_dim is at most 192

  float softmax_scale;  // finite
  float softcap;        // 0 is off; else scores become softcap * tanh(score / softcap)
  // Query row i (aligned bottom right: i + seqlen_k - seqlen_q) sees keys from i - window_left to
  // i + window_right; -1 is unbounded. causal is window_right = 0.
  int32_t causal;
  int32_t window_left;
  int32_t window_right;

  int32_t sm_margin;  // multiprocessors to leave free, 0 or more

  // hopper_attention_forward_workspace_bytes() of device memory, zero before its first use; each
  // call leaves it zero again. For a packed batch hopper_attention_packed_workspace_bytes(), with
  // any contents. Calls that may run at the same time need one each.
  void* workspace;
  void* stream;  // cudaStream_t; null is the default stream

  // What follows, up to the strides of v_token_factor, is for e4m3 alone, and must be zero for
  // other dtypes. Strides of e4m3 tensors are multiples of 16 elements.
  int32_t out_dtype;     // of out: HOPPER_ATTENTION_FLOAT16 or HOPPER_ATTENTION_BFLOAT16
  int32_t accumulation;  // hopper_attention_accumulation
  // 1: v is (batch, heads_kv, head_dim_v, seqlen_k rounded up to 128) with contiguous keys in the
  // order of fp8.h's key_of_slot, zero past seqlen_k; v_stride_seq is that between channels.
  int32_t v_transposed;
  // Tokens that one scale covers: 1, 128, or 0 for the whole sequence.
  int32_t q_descale_tokens, k_descale_tokens;
  int32_t q_descale_per_kv;  // 1: q_descale has a row for each of heads_kv heads; 0: of heads
  // What a stored value is to be multiplied by; positive. Null is 1.
  const float* q_descale;  // (batch, heads or heads_kv, 1 or blocks or seqlen_q)
  const float* k_descale;  // (batch, heads_kv, 1 or blocks or seqlen_k)
  const float* v_descale;  // (batch, heads_kv, 1 or head_dim_v)
  // (batch, heads_kv, seqlen_k), in (0, 1]: a token's scale over v_descale. Null is 1.
  const float* v_token_factor;
  // Strides in floats; along tokens they are 1.
  int64_t q_descale_stride_batch, q_descale_stride_head;
  int64_t k_descale_stride_batch, k_descale_stride_head;
  int64_t v_descale_stride_batch, v_descale_stride_head;
  int64_t v_descale_stride_channel;  // 0: one scale for all channels; 1
  int64_t v_token_factor_stride_batch, v_token_factor_stride_head;

  // 1: a packed batch of float16 or bfloat16. q and out are (seqlen_q, heads, ...), k and v
  // (seqlen_k, heads_kv, ...) and lse (heads, seqlen_q), where seqlen_q and seqlen_k are the totals
  // and batch is the number of sequences; strides of the batch are not taken. Sequence i has rows
  // cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q and out, and those of cu_seqlens_k of k and v. Rows
  // of out that no sequence uses become 0, and their lse -inf.
  int32_t packed;
  // On the device, and read when the kernel runs: (batch + 1), not decreasing, the first 0. Where
  // they are not, no memory outside the tensors is touched, but out is meaningless.
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  // (batch), on the device: how many of its rows a sequence uses, from its first. Null: all.
  const int32_t* seqused_q;
  const int32_t* seqused_k;

  // (heads) logits, with any dtype, that join the softmax of each row of their head without a
  // value: P = exp(score - lse), lse = log(exp(sink) + sum of exp(score)). So lse is sink in a row
  // that sees no key. Null, or -inf, is none.
  const float* sink;
} hopper_attention_forward_args;

// Enqueues the kernel. HOPPER_ATTENTION_OK does not mean that it has run.
HOPPER_ATTENTION_API hopper_attention_status
hopper_attention_forward(const hopper_attention_forward_args* args);

// Bytes of workspace a dense forward call needs; the same for every call.
HOPPER_ATTENTION_API size_t hopper_attention_forward_workspace_bytes(void);

// Bytes of workspace, aligned to 16, that a call of a packed batch needs: 32 for each 128 query
// rows and for each sequence, and 4,608 at most beside them. 0 where a size is negative.
HOPPER_ATTENTION_API size_t hopper_attention_packed_workspace_bytes(int32_t total_q, int32_t batch);

// Writes a JSON object that names the instance, tile, grid and reason for the call that args
// describes, into buffer (NUL-terminated, cut at capacity). Pointers in args are not read and may
// be null. Works without a device (num_sms is then 132, an H100 SXM's or H200's).
HOPPER_ATTENTION_API hopper_attention_status hopper_attention_explain_forward(
    const hopper_attention_forward_args* args, char* buffer, size_t capacity);

// The sentence for this thread's last failure; empty when there was none.
HOPPER_ATTENTION_API const char* hopper_attention_last_error(void);

// "0.1.0", and the names of the compiled forward instances separated by newlines.
HOPPER_ATTENTION_API const char* hopper_attention_version(void);
HOPPER_ATTENTION_API const char* hopper_attention_instances(void);

#ifdef __cplusplus
}
#endif

#include "hopper_attention/abi_backward.h"  // the gradients
#include "hopper_attention/abi_quantize.h"  // the FP8 quantizer
