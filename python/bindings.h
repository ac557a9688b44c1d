// What the files of the Python module _C share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "hopper_attention/abi.h"

// Sets Python's error where status is one; returns whether it is.
inline bool set_error(hopper_attention_status status) {
  if (status == HOPPER_ATTENTION_OK) return false;
  PyObject* type = PyExc_RuntimeError;
  if (status == HOPPER_ATTENTION_INVALID_ARGUMENT) type = PyExc_ValueError;
  if (status == HOPPER_ATTENTION_NOT_SUPPORTED) type = PyExc_NotImplementedError;
  PyErr_SetString(type, hopper_attention_last_error());
  return true;
}

inline void raise_on_failure(hopper_attention_status status) {
  if (set_error(status)) throw pybind11::error_already_set();
}

// Sets what every problem's struct has, its size included.
template <class Args>
void set_problem(Args* args, int dtype, int batch, int seqlen_q, int seqlen_k, int heads,
                 int heads_kv, int head_dim, int head_dim_v, float softmax_scale, float softcap,
                 bool causal, int window_left, int window_right) {
  args->struct_size = sizeof(*args);
  args->dtype = dtype;
  args->batch = batch;
  args->seqlen_q = seqlen_q;
  args->seqlen_k = seqlen_k;
  args->heads = heads;
  args->heads_kv = heads_kv;
  args->head_dim = head_dim;
  args->head_dim_v = head_dim_v;
  args->softmax_scale = softmax_scale;
  args->softcap = softcap;
  args->causal = causal;
  args->window_left = window_left;
  args->window_right = window_right;
}

// JSON: how a call would run.
inline std::string explanation(const hopper_attention_forward_args& args) {
  char buffer[2048];
  raise_on_failure(hopper_attention_explain_forward(&args, buffer, sizeof(buffer)));
  return buffer;
}

void bind_backward(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);
void bind_forward_fp8(pybind11::module_& module);
void bind_varlen(pybind11::module_& module);
