// Eager calls of a function that were made before, made again with no Python between the caller and
// the library, and their gradients. Plain CPython, as call_table.h.
#pragma once

#include <Python.h>

#include "call_table.h"

// eager_calls(call, conditions, formula) -> attend
//
//   call        of a call table whose arguments are the function's own
//   conditions  what says that nobody but autograd would see the call, and whether that would:
//       (types of tensors that are plain, included_keys, the results of that which are plain,
//       callables of which none may give a true value, has_autocast, has_autocast_rule,
//       is_grad_enabled); has_autocast_rule(tensor) is asked where has_autocast() is true
//   formula     None, or (apply, places of the tensors to differentiate, places of the tensors to
//       save beside them and the results, callables of which none may give a true value): what to
//       do where a gradient is wanted
//
//   attend(*arguments): the results' tuple; None where somebody else would see the call, or where
//       it cannot be made again; False where it could be, if it were remembered. A call with a
//       gradient needs a remembered note, which becomes ctx.scalars.
PyObject* make_eager_calls(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

// eager_backward(call, conditions, is_deterministic, fallback, num_inputs) -> apply
//
//   apply(ctx, dout, dlse): a method, for the place of the `apply` of an autograd.Function's ctx:
//       call(is_deterministic(), dout, dlse, *ctx.saved_tensors, *ctx.scalars), filled up with None
//       to num_inputs; where somebody else would see that, where a second gradient is wanted, or
//       where it was not made before, fallback(ctx, saved_tensors or None, dout, dlse).
PyObject* make_eager_backward(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

// The `forward` of the autograd.Function whose `apply` is eager_calls' own:
// eager_forward(ctx, *tensors to differentiate, what eager_calls hands it).
PyObject* eager_forward(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

inline PyCFunction as_function(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// What a Python module of them has.
inline PyMethodDef kCallTableFunctions[] = {
    {"call_table", as_function(&make_call_table), METH_FASTCALL,
     "call_table(exchange, empty, current_device, workspace); see call_table.h."},
    {"eager_calls", as_function(&make_eager_calls), METH_FASTCALL,
     "eager_calls(call, conditions, formula); see eager_calls.h."},
    {"eager_backward", as_function(&make_eager_backward), METH_FASTCALL,
     "eager_backward(call, conditions, is_deterministic, fallback, num_inputs); see "
     "eager_calls.h."},
    {"eager_forward", as_function(&eager_forward), METH_FASTCALL,
     "eager_forward(ctx, *tensors, pending); see eager_calls.h."},
};
