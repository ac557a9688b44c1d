// What the files of the Python module _C share.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "hopper_attention/abi.h"

inline void raise_on_failure(hopper_attention_status status) {
  if (status == HOPPER_ATTENTION_OK) return;
  const std::string message = hopper_attention_last_error();
  if (status == HOPPER_ATTENTION_INVALID_ARGUMENT) throw pybind11::value_error(message);
  if (status == HOPPER_ATTENTION_NOT_SUPPORTED) {
    PyErr_SetString(PyExc_NotImplementedError, message.c_str());
    throw pybind11::error_already_set();
  }
  throw std::runtime_error(message);
}

void bind_quantize(pybind11::module_& module);
void bind_forward_fp8(pybind11::module_& module);
