// Calls whose shape is settled, as Python functions of the addresses alone.
#pragma once

#include <cstdint>
#include <memory>

#include "bindings.h"
#include "call_table.h"

// A prepared call's arguments but for the addresses.
//
// Call has Args, the C interface's struct; kNumAddresses; set_addresses(addresses, Args*);
// run(const Args*), which gives a status; and kName and kDoc for Python.
template <class Call>
struct Prepared : PreparedCall {
  explicit Prepared(const typename Call::Args& settled)
      : PreparedCall{Call::kNumAddresses, &enqueue}, args(settled) {}

  // Threads may share it, so each works on a copy.
  static bool enqueue(const PreparedCall* self, const Pointer* addresses) {
    auto args = static_cast<const Prepared*>(self)->args;
    Call::set_addresses(reinterpret_cast<const Pointer(&)[Call::kNumAddresses]>(*addresses), &args);
    return !set_error(Call::run(&args));
  }

  typename Call::Args args;
};

// What is left of a call, in CPython's own convention, since pybind11's conversion of the arguments
// takes as long as the rest of the call but its launches. self is the capsule of a Prepared.
template <class Call>
PyObject* run_prepared(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != Call::kNumAddresses) {
    return PyErr_Format(PyExc_TypeError, "a prepared call takes %zd addresses, got %zd",
                        Call::kNumAddresses, count);
  }
  const auto* const prepared =
      static_cast<const PreparedCall*>(PyCapsule_GetPointer(self, kPreparedCapsule));
  if (prepared == nullptr) return nullptr;
  Pointer addresses[Call::kNumAddresses];
  for (Py_ssize_t i = 0; i < Call::kNumAddresses; ++i) {
    addresses[i] = PyLong_AsSize_t(arguments[i]);
    if (addresses[i] == static_cast<Pointer>(-1) && PyErr_Occurred()) return nullptr;
  }
  if (!prepared->run(prepared, addresses)) return nullptr;
  Py_RETURN_NONE;
}

template <class Call>
pybind11::object make_prepared(const typename Call::Args& args) {
  static PyMethodDef definition = {
      Call::kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_prepared<Call>)),
      METH_FASTCALL, Call::kDoc};
  // The capsule holds a PreparedCall*, which is what it is read as.
  auto prepared = std::make_unique<Prepared<Call>>(args);
  PyObject* const self =
      PyCapsule_New(static_cast<PreparedCall*>(prepared.get()), kPreparedCapsule, [](PyObject* of) {
        delete static_cast<Prepared<Call>*>(
            static_cast<PreparedCall*>(PyCapsule_GetPointer(of, kPreparedCapsule)));
      });
  if (self == nullptr) throw pybind11::error_already_set();
  prepared.release();
  PyObject* const function = PyCFunction_New(&definition, self);
  Py_DECREF(self);
  if (function == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(function);
}
