// A Python module of the calls that were made before alone: what kCallTableFunctions lists, and
// prepared(function, num_addresses), a prepared call that calls a Python function. test_calls.py
// compiles it.
#include <cstddef>

#include "eager_calls.h"

namespace {

struct PythonCall : PreparedCall {
  PyObject* function;
};

bool run(const PreparedCall* self, const Pointer* addresses) {
  PyObject* const arguments = PyTuple_New(self->num_addresses);
  for (Py_ssize_t i = 0; i < self->num_addresses; ++i) {
    PyTuple_SET_ITEM(arguments, i, PyLong_FromSize_t(addresses[i]));
  }
  PyObject* const result =
      PyObject_CallObject(static_cast<const PythonCall*>(self)->function, arguments);
  Py_DECREF(arguments);
  Py_XDECREF(result);
  return result != nullptr;
}

void destroy(PyObject* capsule) {
  auto* const call = static_cast<PythonCall*>(
      static_cast<PreparedCall*>(PyCapsule_GetPointer(capsule, kPreparedCapsule)));
  Py_DECREF(call->function);
  delete call;
}

PyObject* call_function(PyObject* self, PyObject* arguments) {
  auto* const call = static_cast<PreparedCall*>(PyCapsule_GetPointer(self, kPreparedCapsule));
  return PyObject_CallObject(static_cast<PythonCall*>(call)->function, arguments);
}

PyMethodDef kFunction = {"prepared_function", &call_function, METH_VARARGS, nullptr};

PyObject* prepared(PyObject*, PyObject* arguments) {
  PyObject* function;
  Py_ssize_t num_addresses;
  if (!PyArg_ParseTuple(arguments, "On", &function, &num_addresses)) return nullptr;
  Py_INCREF(function);
  auto* const call = new PythonCall{{num_addresses, &run}, function};
  PyObject* const self =
      PyCapsule_New(static_cast<PreparedCall*>(call), kPreparedCapsule, &destroy);
  PyObject* const result = PyCFunction_New(&kFunction, self);
  Py_DECREF(self);
  return result;
}

PyMethodDef kPrepared = {"prepared", &prepared, METH_VARARGS, nullptr};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "calls_module",
                       nullptr,
                       -1,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_calls_module(void) {
  PyObject* const module = PyModule_Create(&kModule);
  const auto add = [&](PyMethodDef* definition) {
    PyModule_AddObject(module, definition->ml_name, PyCFunction_New(definition, nullptr));
  };
  for (PyMethodDef& definition : kCallTableFunctions) add(&definition);
  add(&kPrepared);
  return module;
}
