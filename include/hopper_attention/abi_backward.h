// The C interface of the backward pass; abi.h includes it, and its rules hold here too.
#pragma once

#include "hopper_attention/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

// The gradients of hopper_attention_forward: dq, dk, dv from dout and what the forward pass read
// and wrote. Fields that both argument structs have mean the same in both.
typedef struct hopper_attention_backward_args {
  uint64_t struct_size;  // sizeof(hopper_attention_backward_args)

  const void* q;      // (batch, seqlen_q, heads, head_dim), 16-byte aligned
  const void* k;      // (batch, seqlen_k, heads_kv, head_dim), 16-byte aligned
  const void* v;      // (batch, seqlen_k, heads_kv, head_dim_v), 16-byte aligned
  const void* out;    // (batch, seqlen_q, heads, head_dim_v), 16-byte aligned; the forward pass's
  const void* dout;   // (batch, seqlen_q, heads, head_dim_v), 16-byte aligned
  const float* lse;   // (batch, heads, seqlen_q) contiguous; the forward pass's
  const float* dlse;  // (batch, heads, seqlen_q) contiguous, the gradient of lse; may be null
  void* dq;           // (batch, seqlen_q, heads, head_dim), 16-byte aligned, written whole
  void* dk;           // (batch, seqlen_k, heads_kv, head_dim), 16-byte aligned, written whole
  void* dv;           // (batch, seqlen_k, heads_kv, head_dim_v), 16-byte aligned, written whole

  // Element strides of batch, sequence and head; multiples of 8 (16 bytes, TMA's granule) or 0.
  int64_t q_stride_batch, q_stride_seq, q_stride_head;
  int64_t k_stride_batch, k_stride_seq, k_stride_head;
  int64_t v_stride_batch, v_stride_seq, v_stride_head;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;
  int64_t dout_stride_batch, dout_stride_seq, dout_stride_head;
  int64_t dq_stride_batch, dq_stride_seq, dq_stride_head;
  int64_t dk_stride_batch, dk_stride_seq, dk_stride_head;
  int64_t dv_stride_batch, dv_stride_seq, dv_stride_head;

  int32_t dtype;  // hopper_attention_dtype of all tensors but lse and dlse
  int32_t batch;
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t heads;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t head_dim_v;

  float softmax_scale;
  float softcap;
  int32_t causal;
  int32_t window_left;
  int32_t window_right;

  // Adds up dq in a fixed order: the same call gives the same bits. dk and dv always are.
  int32_t deterministic;

  // hopper_attention_backward_workspace_bytes of device memory, 128-byte aligned, of any contents.
  void* workspace;
  void* stream;  // cudaStream_t; null is the default stream

  // The sinks that the forward pass had, and their gradient, written whole: (heads) each. dsink may
  // be null; sink only beside it, as lse holds all that the other gradients need of it.
  const float* sink;
  float* dsink;

  // As in hopper_attention_forward_args. Rows of dq, dk and dv that no sequence uses become 0.
  int32_t packed;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_q;
  const int32_t* seqused_k;
} hopper_attention_backward_args;

// Enqueues the kernels. HOPPER_ATTENTION_OK does not mean that they have run.
HOPPER_ATTENTION_API hopper_attention_status
hopper_attention_backward(const hopper_attention_backward_args* args);

// Bytes of workspace for the call that args describes: dq's fp32 accumulator, two or three numbers
// a query row, and for a packed batch up to a tile more of these for each sequence, and its list of
// key blocks. Pointers in args are not read and may be null. Needs no device.
HOPPER_ATTENTION_API hopper_attention_status hopper_attention_backward_workspace_bytes(
    const hopper_attention_backward_args* args, uint64_t* bytes);

// The names of the compiled backward instances, "backward_bf16_d128_full", separated by newlines.
HOPPER_ATTENTION_API const char* hopper_attention_backward_instances(void);

#ifdef __cplusplus
}
#endif
