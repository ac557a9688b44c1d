// Adds the backward pass's functions to the Python module _C.
#pragma once

#include <pybind11/pybind11.h>

void bind_backward(pybind11::module_& module);
