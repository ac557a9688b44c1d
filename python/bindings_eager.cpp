#include "eager_calls.h"

#include "call_entries.h"

namespace {

constexpr const char* kPendingCapsule = "hopper_attention.pending_call";

// A Python function's yes or no.
Answer ask(PyObject* function, PyObject* argument = nullptr) {
  const Ref answer(argument == nullptr ? PyObject_CallNoArgs(function)
                                       : PyObject_CallOneArg(function, argument));
  if (!answer) return Answer::kError;
  const int is_true = PyObject_IsTrue(answer.get());
  return is_true < 0 ? Answer::kError : is_true ? Answer::kYes : Answer::kNo;
}

// kNo where one of a tuple of functions says yes.
Answer none_of(PyObject* functions) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(functions); ++i) {
    const Answer answer = ask(PyTuple_GET_ITEM(functions, i));
    if (answer != Answer::kNo) return answer == Answer::kYes ? Answer::kNo : answer;
  }
  return Answer::kYes;
}

PyObject* names[6];  // interned
enum Name {
  kRequiresGrad,
  kIsNeg,
  kSaveForBackward,
  kSetMaterializeGrads,
  kScalars,
  kSavedTensors,
};
PyObject* name_of(Name name) {
  static const char* const texts[] = {"requires_grad",         "is_neg",  "save_for_backward",
                                      "set_materialize_grads", "scalars", "saved_tensors"};
  if (names[name] == nullptr) names[name] = PyUnicode_InternFromString(texts[name]);
  return names[name];
}

struct Conditions {
  Ref all;  // which owns the others
  PyObject *types, *included_keys, *plain_keys, *forbidden, *has_autocast, *has_rule, *grad_enabled;

  bool read(PyObject* given) {
    all = Ref::borrowed(given);
    return PyArg_ParseTuple(given, "O!OO!O!OOO", &PyTuple_Type, &types, &included_keys,
                            &PyTuple_Type, &plain_keys, &PyTuple_Type, &forbidden, &has_autocast,
                            &has_rule, &grad_enabled) != 0;
  }

  bool is_plain_type(PyObject* tensor) const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == PyTuple_GET_ITEM(types, i)) return true;
    }
    return false;
  }

  // Whether neither this thread's state nor the tensors' types show the call to somebody else.
  Answer are_met(const Request& request) const {
    PyObject* first = nullptr;
    for (Py_ssize_t i = 0; i < request.count; ++i) {
      if ((request.tensors >> i & 1) == 0) continue;
      PyObject* const tensor = request.arguments[i];
      if (!is_plain_type(tensor)) return Answer::kNo;
      if (first == nullptr) first = tensor;
      // The views of a conjugated tensor's imaginary part are negative only by a bit, and have
      // gaps.
      if ((request.with_gaps >> i & 1) != 0) {
        const Ref is_negative(PyObject_CallMethodNoArgs(tensor, name_of(kIsNeg)));
        if (!is_negative) return Answer::kError;
        if (is_negative.get() != Py_False) return Answer::kNo;
      }
    }
    if (const Answer answer = none_of(forbidden); answer != Answer::kYes) return answer;
    if (const Answer autocast = ask(has_autocast); autocast != Answer::kNo) {
      if (autocast == Answer::kError) return autocast;
      const Answer rule = ask(has_rule, first);
      if (rule != Answer::kNo) return rule == Answer::kYes ? Answer::kNo : rule;
    }
    return has_plain_keys();
  }

  Answer has_plain_keys() const {
    const Ref included(PyObject_CallNoArgs(included_keys));
    if (!included) return Answer::kError;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(plain_keys); ++i) {
      const Ref equal(PyObject_RichCompare(included.get(), PyTuple_GET_ITEM(plain_keys, i), Py_EQ));
      if (!equal) return Answer::kError;
      if (equal.get() == Py_True) return Answer::kYes;
    }
    return Answer::kNo;
  }

  // Whether autograd will ask for a gradient of one of the tensors.
  Answer want_gradient(const Request& request) const {
    const Answer enabled = ask(grad_enabled);
    if (enabled != Answer::kYes) return enabled;
    for (Py_ssize_t i = 0; i < request.count; ++i) {
      if ((request.tensors >> i & 1) == 0) continue;
      const Ref required(PyObject_GetAttr(request.arguments[i], name_of(kRequiresGrad)));
      if (!required) return Answer::kError;
      if (required.get() == Py_True) return Answer::kYes;
    }
    return Answer::kNo;
  }
};

struct EagerCalls {
  Ref call;  // which owns the table
  Table* table;
  Conditions conditions;
  Ref formula;  // or none
  PyObject *apply = nullptr, *forbidden = nullptr;
  std::vector<int> inputs, saved;
};

// Between attend and eager_forward, on the stack of the former.
struct Pending {
  const EagerCalls* calls;
  const Entry* entry;
  Request* request;
};

template <class Struct>
PyObject* make_function(PyMethodDef* definition, std::unique_ptr<Struct> state) {
  const Ref capsule(PyCapsule_New(state.get(), definition->ml_name, [](PyObject* self) {
    delete static_cast<Struct*>(PyCapsule_GetPointer(self, PyCapsule_GetName(self)));
  }));
  if (!capsule) return nullptr;
  state.release();
  return PyCFunction_New(definition, capsule.get());
}

PyObject* differentiable(const EagerCalls& calls, const Entry& entry, Request* request) {
  if (!calls.formula || entry.note() == Py_None) Py_RETURN_NONE;
  const Answer alone = none_of(calls.forbidden);
  if (alone == Answer::kError) return nullptr;
  if (alone == Answer::kNo) Py_RETURN_NONE;
  Pending pending{&calls, &entry, request};
  const Ref capsule(PyCapsule_New(&pending, kPendingCapsule, nullptr));
  if (!capsule) return nullptr;
  PyObject* arguments[kMaxArguments + 1];
  std::size_t count = 0;
  for (const int place : calls.inputs) arguments[count++] = request->arguments[place];
  arguments[count++] = capsule.get();
  Ref results(PyObject_Vectorcall(calls.apply, arguments, count, nullptr));
  PyCapsule_SetName(capsule.get(), "done");  // what it points to is no more
  return results.release();
}

PyObject* attend(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const auto* const calls =
      static_cast<const EagerCalls*>(PyCapsule_GetPointer(self, "eager_call"));
  if (calls == nullptr) return nullptr;
  Request request;
  if (!read_request(*calls->table->exchange, arguments, count, &request)) Py_RETURN_NONE;
  const Answer met = calls->conditions.are_met(request);
  if (met == Answer::kError) return nullptr;
  if (met == Answer::kNo) Py_RETURN_NONE;
  const std::shared_ptr<const Entry> entry = find(*calls->table, request.key);
  if (entry == nullptr) Py_RETURN_FALSE;
  const Answer ready = is_ready(*calls->table, request);
  if (ready == Answer::kError) return nullptr;
  if (ready == Answer::kNo) Py_RETURN_NONE;
  const Answer gradient = calls->conditions.want_gradient(request);
  if (gradient == Answer::kError) return nullptr;
  return gradient == Answer::kYes ? differentiable(*calls, *entry, &request)
                                  : make_call(*calls->table, *entry, &request);
}

bool read_places(PyObject* given, std::vector<int>* places) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
    const long place = PyLong_AsLong(PyTuple_GET_ITEM(given, i));
    if (place < 0 || place >= kMaxArguments) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no place of an argument");
      return false;
    }
    places->push_back(static_cast<int>(place));
  }
  return true;
}

// Keeps in ctx what the backward pass reads.
bool save(PyObject* ctx, const Pending& pending, PyObject* results) {
  PyObject* kept[1 + 2 * kMaxArguments + kMaxOutputs] = {ctx};
  std::size_t count = 1;
  for (const int place : pending.calls->inputs) kept[count++] = pending.request->arguments[place];
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(results); ++i) {
    kept[count++] = PyTuple_GET_ITEM(results, i);
  }
  for (const int place : pending.calls->saved) kept[count++] = pending.request->arguments[place];
  const Ref saved(PyObject_VectorcallMethod(name_of(kSaveForBackward), kept, count, nullptr));
  if (!saved) return false;
  // so that an unused LSE has no gradient, not one of zeros
  PyObject* const materialize[] = {ctx, Py_False};
  const Ref set(PyObject_VectorcallMethod(name_of(kSetMaterializeGrads), materialize, 2, nullptr));
  return set && PyObject_SetAttr(ctx, name_of(kScalars), pending.entry->note()) == 0;
}

struct EagerBackward {
  Ref call;  // which owns the table
  Table* table;
  Conditions conditions;
  Ref is_deterministic, fallback;
  Py_ssize_t num_inputs;
};

PyObject* call_fallback(const EagerBackward& backward, PyObject* ctx, PyObject* saved,
                        PyObject* const* gradients) {
  PyObject* const arguments[] = {ctx, saved, gradients[0], gradients[1]};
  return PyObject_Vectorcall(backward.fallback.get(), arguments, 4, nullptr);
}

// The gradients; None where the call was not made before or somebody else would see it.
PyObject* call_with(const EagerBackward& backward, PyObject* const* gradients, PyObject* saved,
                    PyObject* scalars) {
  const Ref deterministic(PyObject_CallNoArgs(backward.is_deterministic.get()));
  if (!deterministic) return nullptr;
  const Py_ssize_t num_saved = PyTuple_GET_SIZE(saved), num_scalars = PyTuple_GET_SIZE(scalars);
  if (3 + num_saved + num_scalars > kMaxArguments) Py_RETURN_NONE;
  PyObject* arguments[kMaxArguments] = {deterministic.get(), gradients[0], gradients[1]};
  Py_ssize_t count = 3;
  for (Py_ssize_t i = 0; i < num_saved; ++i) arguments[count++] = PyTuple_GET_ITEM(saved, i);
  for (Py_ssize_t i = 0; i < num_scalars; ++i) arguments[count++] = PyTuple_GET_ITEM(scalars, i);
  Request request;
  if (!read_request(*backward.table->exchange, arguments, count, &request)) Py_RETURN_NONE;
  const Answer met = backward.conditions.are_met(request);
  if (met == Answer::kError) return nullptr;
  const std::shared_ptr<const Entry> entry =
      met == Answer::kYes ? find(*backward.table, request.key) : nullptr;
  if (entry == nullptr) Py_RETURN_NONE;
  const Answer ready = is_ready(*backward.table, request);
  if (ready == Answer::kError) return nullptr;
  if (ready == Answer::kNo) Py_RETURN_NONE;
  return make_call(*backward.table, *entry, &request);
}

PyObject* differentiate(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const auto* const backward =
      static_cast<const EagerBackward*>(PyCapsule_GetPointer(self, "eager_backward"));
  if (backward == nullptr) return nullptr;
  if (count != 3) return PyErr_Format(PyExc_TypeError, "apply takes ctx and 2 gradients");
  PyObject* const ctx = arguments[0];
  const Answer again = ask(backward->conditions.grad_enabled);
  if (again == Answer::kError) return nullptr;
  if (again == Answer::kYes || arguments[1] == Py_None) {
    return call_fallback(*backward, ctx, Py_None, arguments + 1);
  }
  // Once: activation checkpointing hands them out no second time.
  const Ref saved(PyObject_GetAttr(ctx, name_of(kSavedTensors)));
  const Ref scalars(saved ? PyObject_GetAttr(ctx, name_of(kScalars)) : nullptr);
  if (!scalars) return nullptr;
  if (!PyTuple_Check(saved.get()) || !PyTuple_Check(scalars.get())) {
    return PyErr_Format(PyExc_TypeError, "ctx.saved_tensors and ctx.scalars must be tuples");
  }
  const Ref gradients(call_with(*backward, arguments + 1, saved.get(), scalars.get()));
  if (!gradients) return nullptr;
  if (gradients.get() == Py_None) return call_fallback(*backward, ctx, saved.get(), arguments + 1);
  Ref all(PyTuple_New(backward->num_inputs));
  if (!all) return nullptr;
  const Py_ssize_t num_gradients = PyTuple_GET_SIZE(gradients.get());
  for (Py_ssize_t i = 0; i < backward->num_inputs; ++i) {
    PyObject* const of = i < num_gradients ? PyTuple_GET_ITEM(gradients.get(), i) : Py_None;
    PyTuple_SET_ITEM(all.get(), i, Ref::borrowed(of).release());
  }
  return all.release();
}

}  // namespace

PyObject* make_eager_calls(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static PyMethodDef definition = {"eager_call", as_function(&attend), METH_FASTCALL,
                                   "Make a call again, or return None or False."};
  if (count != 3) return PyErr_Format(PyExc_TypeError, "eager_calls takes 3 arguments");
  auto calls = std::make_unique<EagerCalls>();
  calls->call = Ref::borrowed(arguments[0]);
  calls->table = table_of(arguments[0]);
  if (calls->table == nullptr || !calls->conditions.read(arguments[1])) return nullptr;
  if (arguments[2] != Py_None) {
    PyObject *inputs, *saved;
    if (!PyArg_ParseTuple(arguments[2], "OO!O!O!", &calls->apply, &PyTuple_Type, &inputs,
                          &PyTuple_Type, &saved, &PyTuple_Type, &calls->forbidden) ||
        !read_places(inputs, &calls->inputs) || !read_places(saved, &calls->saved)) {
      return nullptr;
    }
    calls->formula = Ref::borrowed(arguments[2]);
  }
  return make_function(&definition, std::move(calls));
}

PyObject* make_eager_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static PyMethodDef definition = {"eager_backward", as_function(&differentiate), METH_FASTCALL,
                                   "Make a backward call again, or pass it on."};
  if (count != 5) return PyErr_Format(PyExc_TypeError, "eager_backward takes 5 arguments");
  auto backward = std::make_unique<EagerBackward>();
  backward->call = Ref::borrowed(arguments[0]);
  backward->table = table_of(arguments[0]);
  if (backward->table == nullptr || !backward->conditions.read(arguments[1])) return nullptr;
  backward->is_deterministic = Ref::borrowed(arguments[2]);
  backward->fallback = Ref::borrowed(arguments[3]);
  backward->num_inputs = PyLong_AsSsize_t(arguments[4]);
  if (backward->num_inputs == -1 && PyErr_Occurred()) return nullptr;
  const Ref function(make_function(&definition, std::move(backward)));
  return function ? PyInstanceMethod_New(function.get()) : nullptr;
}

PyObject* eager_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const auto* const pending = count < 2 ? nullptr
                                        : static_cast<const Pending*>(PyCapsule_GetPointer(
                                              arguments[count - 1], kPendingCapsule));
  if (pending == nullptr) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "forward takes ctx and what follows");
    return nullptr;
  }
  Ref results(make_call(*pending->calls->table, *pending->entry, pending->request));
  if (!results || !save(arguments[0], *pending, results.get())) return nullptr;
  return results.release();
}
