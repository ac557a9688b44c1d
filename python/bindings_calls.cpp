#include "call_entries.h"
#include "eager_calls.h"

namespace {

constexpr std::size_t kMaxEntries = 4096;
constexpr Pointer kAlignment = 16;
constexpr const char* kTableCapsule = "hopper_attention.call_table";

// -1 with Python's error set where there is none.
long current_device(const Table& table) {
  const Ref device(PyObject_CallNoArgs(table.current_device.get()));
  return device ? PyLong_AsLong(device.get()) : -1;
}

// A reference to no object, with Python's error set, where it fails.
Ref shared_workspace(Table& table, int device, void* stream) {
  const auto found = table.default_workspaces.find(device);
  if (stream == nullptr && found != table.default_workspaces.end()) {
    return Ref::borrowed(found->second.get());
  }
  const auto number = static_cast<unsigned long long>(reinterpret_cast<Pointer>(stream));
  Ref workspace(PyObject_CallFunction(table.workspace.get(), "iK", device, number));
  if (stream == nullptr && workspace) {
    table.default_workspaces[device] = Ref::borrowed(workspace.get());
  }
  return workspace;
}

// Allocates the outputs, behind the arguments' addresses.
bool allocate(const Table& table, const Entry& entry, Ref* outputs, Pointer* addresses) {
  for (std::size_t i = 0; i < entry.outputs.size(); ++i) {
    PyObject* const layout = entry.outputs[i].get();
    PyObject* const arguments[] = {PyTuple_GET_ITEM(layout, 0), PyTuple_GET_ITEM(layout, 1),
                                   PyTuple_GET_ITEM(layout, 2)};
    outputs[i] = Ref(PyObject_Vectorcall(table.empty.get(), arguments, 3, nullptr));
    ExchangeTensor tensor;
    if (!outputs[i] || !read_tensor(*table.exchange, outputs[i].get(), &tensor)) return false;
    addresses[i] = address_of(tensor);
  }
  return true;
}

bool run_steps(const Entry& entry, const Pointer* addresses) {
  for (const Step& step : entry.steps) {
    Pointer ordered[kMaxAddresses];
    for (std::size_t i = 0; i < step.order.size(); ++i) {
      ordered[i] = addresses[step.order[i].index] + step.order[i].offset;
    }
    if (!step.prepared->run(step.prepared, ordered)) return false;
  }
  return true;
}

PyObject* wrong(const char* message) {
  PyErr_SetString(PyExc_ValueError, message);
  return nullptr;
}

bool read_place(PyObject* given, int num_places, Place* place) {
  Py_ssize_t offset = 0;
  if (PyTuple_Check(given)) {
    if (!PyArg_ParseTuple(given, "in", &place->index, &offset)) return false;
  } else {
    place->index = static_cast<int>(PyLong_AsLong(given));
    if (place->index == -1 && PyErr_Occurred()) return false;
  }
  place->offset = static_cast<Pointer>(offset);
  const bool is_one = place->index >= 0 && place->index < num_places && offset >= 0;
  return is_one || wrong("order has a place that is none") != nullptr;
}

// num_places: of all that addresses are taken from, the last two the workspace and nothing.
bool read_step(PyObject* given, int num_places, Entry* entry, std::uint64_t* places) {
  PyObject *run, *order;
  if (!PyArg_ParseTuple(given, "OO!", &run, &PyTuple_Type, &order)) return false;
  Step step{Ref::borrowed(run), nullptr, {}};
  if (PyCFunction_Check(run) && PyCFunction_GetSelf(run) != nullptr) {
    step.prepared = static_cast<const PreparedCall*>(
        PyCapsule_GetPointer(PyCFunction_GetSelf(run), kPreparedCapsule));
  }
  if (step.prepared == nullptr) return wrong("run must be a prepared call") != nullptr;
  if (PyTuple_GET_SIZE(order) != step.prepared->num_addresses) {
    return wrong("order must have a place for each address of the call") != nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(order); ++i) {
    Place place;
    if (!read_place(PyTuple_GET_ITEM(order, i), num_places, &place)) return false;
    entry->takes_workspace |= place.index == num_places - 2;
    *places |= std::uint64_t{1} << place.index;
    step.order.push_back(place);
  }
  entry->steps.push_back(std::move(step));
  return true;
}

// Fills in what `remember` was given, and which places its steps take addresses from; false, with
// Python's error set, where it is wrong.
bool read_entry(PyObject* steps, PyObject* outputs, Py_ssize_t count, Entry* entry,
                std::uint64_t* places) {
  const Py_ssize_t num_outputs = PyTuple_GET_SIZE(outputs);
  if (count > kMaxArguments || num_outputs > kMaxOutputs || entry->num_results > num_outputs) {
    return wrong("too many arguments, outputs or results") != nullptr;
  }
  for (Py_ssize_t i = 0; i < num_outputs; ++i) {
    PyObject* const layout = PyTuple_GET_ITEM(outputs, i);
    if (!PyTuple_Check(layout) || PyTuple_GET_SIZE(layout) != 3) {
      return wrong("an output must be (shape, strides, dtype)") != nullptr;
    }
    entry->outputs.push_back(Ref::borrowed(layout));
  }
  entry->takes_workspace = false;
  const int num_places = static_cast<int>(count + num_outputs + 3);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); ++i) {
    if (!read_step(PyTuple_GET_ITEM(steps, i), num_places, entry, places)) return false;
  }
  return true;
}

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  auto* const table = static_cast<Table*>(PyCapsule_GetPointer(self, kTableCapsule));
  return table == nullptr ? nullptr : call_again(*table, arguments, count);
}

PyObject* known(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  auto* const table = static_cast<Table*>(PyCapsule_GetPointer(self, kTableCapsule));
  if (table == nullptr) return nullptr;
  Request request;
  if (!read_request(*table->exchange, arguments, count, &request)) Py_RETURN_NONE;
  const std::shared_ptr<const Entry> entry = find(*table, request.key);
  if (entry == nullptr) Py_RETURN_NONE;
  return Ref::borrowed(entry->given.get()).release();
}

PyObject* remember(PyObject* self, PyObject* given) {
  auto* const table = static_cast<Table*>(PyCapsule_GetPointer(self, kTableCapsule));
  if (table == nullptr) return nullptr;
  PyObject *arguments, *steps, *outputs, *note;
  auto entry = std::make_shared<Entry>();
  if (!PyArg_ParseTuple(given, "O!O!O!nO", &PyTuple_Type, &arguments, &PyTuple_Type, &steps,
                        &PyTuple_Type, &outputs, &entry->num_results, &note)) {
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
  std::uint64_t places = 0;
  if (!read_entry(steps, outputs, count, entry.get(), &places)) return nullptr;
  entry->given = Ref(PyTuple_GetSlice(given, 1, 5));
  if (!entry->given) return nullptr;
  std::vector<PyObject*> listed;
  for (Py_ssize_t i = 0; i < count; ++i) listed.push_back(PyTuple_GET_ITEM(arguments, i));
  Request request;
  if (!read_request(*table->exchange, listed.data(), count, &request)) Py_RETURN_NONE;
  if ((request.tensors & ~places) != 0 || find(*table, request.key) != nullptr) Py_RETURN_NONE;
  entry->words = request.key.words();
  decltype(table->entries) forgotten;  // freed last: that may run Python
  if (table->entries.size() >= kMaxEntries) forgotten.swap(table->entries);
  table->entries.emplace(request.key.hash(), std::move(entry));
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    {"call", as_function(&call), METH_FASTCALL,
     "Make a call that was made before, or return None."},
    {"remember", &remember, METH_VARARGS, "remember(arguments, steps, outputs, num_results, note)"},
    {"known", as_function(&known), METH_FASTCALL, "What was remembered of a call, or None."},
};

}  // namespace

Table* table_of(PyObject* function) {
  PyObject* const self = PyCFunction_Check(function) ? PyCFunction_GetSelf(function) : nullptr;
  if (self == nullptr) return static_cast<Table*>(static_cast<void*>(wrong("no call of a table")));
  return static_cast<Table*>(PyCapsule_GetPointer(self, kTableCapsule));
}

std::shared_ptr<const Entry> find(const Table& table, const Key& key) {
  const auto [begin, end] = table.entries.equal_range(key.hash());
  for (auto it = begin; it != end; ++it) {
    if (key.equals(it->second->words)) return it->second;
  }
  return nullptr;
}

Answer is_ready(const Table& table, const Request& request) {
  if (request.all_addresses % kAlignment != 0) return Answer::kNo;
  const long device = current_device(table);
  if (device == -1 && PyErr_Occurred()) return Answer::kError;
  return device == request.device.id ? Answer::kYes : Answer::kNo;
}

PyObject* make_call(Table& table, const Entry& entry, Request* request) {
  Ref outputs[kMaxOutputs];
  Pointer* const behind = request->addresses + request->count;
  if (!allocate(table, entry, outputs, behind)) return nullptr;
  void* stream = nullptr;
  const ExchangeDevice device = request->device;
  if (table.exchange->current_work_stream(device.type, device.id, &stream) != 0) return nullptr;
  Pointer* const more = behind + entry.outputs.size();
  more[0] = reinterpret_cast<Pointer>(stream);
  more[1] = more[2] = 0;
  Ref workspace;  // held until the call is enqueued
  if (entry.takes_workspace) {
    workspace = shared_workspace(table, device.id, stream);
    ExchangeTensor tensor;
    if (!workspace || !read_tensor(*table.exchange, workspace.get(), &tensor)) return nullptr;
    more[1] = address_of(tensor);
  }
  if (!run_steps(entry, request->addresses)) return nullptr;
  Ref results(PyTuple_New(entry.num_results));
  if (!results) return nullptr;
  for (Py_ssize_t i = 0; i < entry.num_results; ++i) {
    PyTuple_SET_ITEM(results.get(), i, outputs[i].release());
  }
  return results.release();
}

PyObject* call_again(Table& table, PyObject* const* arguments, Py_ssize_t count) {
  Request request;
  if (!read_request(*table.exchange, arguments, count, &request)) Py_RETURN_NONE;
  const std::shared_ptr<const Entry> entry = find(table, request.key);
  if (entry == nullptr) Py_RETURN_NONE;
  const Answer ready = is_ready(table, request);
  if (ready == Answer::kError) return nullptr;
  if (ready == Answer::kNo) Py_RETURN_NONE;
  return make_call(table, *entry, &request);
}

PyObject* make_call_table(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "call_table takes 4 arguments");
  const auto* exchange =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(arguments[0], kExchangeCapsule));
  if (exchange == nullptr) return nullptr;
  if (exchange->major != kExchangeMajor || exchange->tensor_from_py_object == nullptr) {
    Py_RETURN_NONE;
  }
  auto table = std::make_unique<Table>();
  table->exchange = exchange;
  table->empty = Ref::borrowed(arguments[1]);
  table->current_device = Ref::borrowed(arguments[2]);
  table->workspace = Ref::borrowed(arguments[3]);
  const Ref capsule(PyCapsule_New(table.get(), kTableCapsule, [](PyObject* self) {
    delete static_cast<Table*>(PyCapsule_GetPointer(self, kTableCapsule));
  }));
  if (!capsule) return nullptr;
  table.release();
  const Ref functions = Ref(PyTuple_New(3));
  if (!functions) return nullptr;
  for (int i = 0; i < 3; ++i) {
    PyObject* const function = PyCFunction_New(&kFunctions[i], capsule.get());
    if (function == nullptr) return nullptr;
    PyTuple_SET_ITEM(functions.get(), i, function);
  }
  return Ref::borrowed(functions.get()).release();
}
