// Calls that were made before, found again by what their arguments look like. Plain CPython, so
// that it can be tested without pybind11, the library or a device.
#pragma once

#include <Python.h>

#include <cstdint>

using Pointer = std::uintptr_t;

// A call whose shape is settled: what the capsule of a prepared call (prepared.h) points to.
struct PreparedCall {
  Py_ssize_t num_addresses;
  // Makes the call; false, with Python's error set, where it fails.
  bool (*run)(const PreparedCall* self, const Pointer* addresses);
};

constexpr const char* kPreparedCapsule = "hopper_attention.prepared_call";

// call_table(exchange, empty, current_device, workspace) -> (call, remember, known), or None where
// the exchange interface has another version. In CPython's convention METH_FASTCALL.
//
//   exchange        PyTorch's capsule torch.Tensor.__dlpack_c_exchange_api__
//   empty           empty(shape, strides, dtype), a tensor on the current device
//   current_device  its index
//   workspace       workspace(device, stream), a tensor that calls on the stream share; it is asked
//                   for each call's, but that of the default stream, 0, once
//
//   call(*arguments): tensors, None, floats, integers, bools, strings, and tuples of those but
//       tensors. Makes the call that was remembered of arguments that look the same, and returns
//       the tuple of its results; None where there is none, or where an address is no multiple of
//       16 bytes, or another device is current.
//   remember(arguments, steps, outputs, num_results, note): `steps` are (run, order) each, made one
//       after the other; `run` is a prepared call, and `order` says which addresses it takes, by
//       their places in (*arguments, *outputs, stream, workspace, nothing), where what is no tensor
//       is 0, or by (place, bytes behind it); `outputs` are what `empty` takes, of which the first
//       num_results are returned and the rest is freed behind the call; `note` is for whoever looks
//       the call up. Not remembered where a tensor is in no order: its elements may matter.
//   known(*arguments): (steps, outputs, num_results, note) of what `call` would find, or None.
PyObject* make_call_table(PyObject* self, PyObject* const* arguments, Py_ssize_t count);
