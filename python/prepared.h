// Calls whose shape is settled, as Python functions of the addresses alone.
#pragma once

#include <cstdint>
#include <memory>

#include "bindings.h"

using Pointer = std::uintptr_t;

// What is left of a call, in CPython's own convention, since pybind11's conversion of the arguments
// takes as long as the rest of the call but its launches. self is a capsule with the arguments;
// threads may share it, so each works on a copy.
//
// Call has Args, the C interface's struct; kNumAddresses; set_addresses(addresses, Args*);
// run(const Args*), which gives a status; and kName and kDoc for Python.
template <class Call>
PyObject* run_prepared(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != Call::kNumAddresses) {
    return PyErr_Format(PyExc_TypeError, "a prepared call takes %zd addresses, got %zd",
                        Call::kNumAddresses, count);
  }
  const void* const prepared = PyCapsule_GetPointer(self, nullptr);
  if (prepared == nullptr) return nullptr;
  auto args = *static_cast<const typename Call::Args*>(prepared);
  Pointer addresses[Call::kNumAddresses];
  for (Py_ssize_t i = 0; i < Call::kNumAddresses; ++i) {
    addresses[i] = PyLong_AsSize_t(arguments[i]);
    if (addresses[i] == static_cast<Pointer>(-1) && PyErr_Occurred()) return nullptr;
  }
  Call::set_addresses(addresses, &args);
  if (set_error(Call::run(&args))) return nullptr;
  Py_RETURN_NONE;
}

template <class Call>
pybind11::object make_prepared(const typename Call::Args& args) {
  static PyMethodDef definition = {
      Call::kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_prepared<Call>)),
      METH_FASTCALL, Call::kDoc};
  auto copy = std::make_unique<typename Call::Args>(args);
  const pybind11::capsule self(
      copy.get(), [](void* prepared) { delete static_cast<typename Call::Args*>(prepared); });
  copy.release();
  PyObject* const function = PyCFunction_New(&definition, self.ptr());
  if (function == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(function);
}
