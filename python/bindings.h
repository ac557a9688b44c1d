// What the files of the Python module _C share.
#pragma once

#include <pybind11/pybind11.h>

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

void bind_backward(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);
void bind_forward_fp8(pybind11::module_& module);
void bind_varlen(pybind11::module_& module);
