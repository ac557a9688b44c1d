#include "call_table.h"

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "exchange.h"

namespace {

constexpr int kMaxArguments = 24;
constexpr int kMaxOutputs = 8;
constexpr int kMaxAddresses = kMaxArguments + kMaxOutputs + 3;
constexpr int kMaxDims = 5;
constexpr int kMaxWords = 160;
constexpr std::size_t kMaxEntries = 4096;
constexpr Pointer kAlignment = 16;

// A reference to a Python object.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  Ref(Ref&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  static Ref borrowed(PyObject* object) {
    Py_INCREF(object);
    return Ref(object);
  }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_ = nullptr;
};

// What arguments look like: kinds and values of scalars; of tensors all but the address.
class Key {
 public:
  bool push(std::int64_t word) {
    if (count_ == kMaxWords) return false;
    words_[count_++] = word;
    hash_ = (hash_ ^ static_cast<std::uint64_t>(word)) * 0x9E3779B97F4A7C15u;
    hash_ ^= hash_ >> 32;
    return true;
  }
  std::uint64_t hash() const { return hash_; }
  std::vector<std::int64_t> words() const { return {words_.begin(), words_.begin() + count_}; }
  bool equals(const std::vector<std::int64_t>& words) const {
    return words.size() == count_ &&
           std::memcmp(words.data(), words_.data(), count_ * sizeof(std::int64_t)) == 0;
  }

 private:
  std::size_t count_ = 0;
  std::uint64_t hash_ = 0;
  std::array<std::int64_t, kMaxWords> words_;  // the first count_ are set
};

enum Kind : std::int64_t { kNone, kBool, kInt, kFloat, kTensor };

struct Entry {
  std::vector<std::int64_t> words;
  Ref run;  // which owns what `prepared` points to
  const PreparedCall* prepared;
  std::vector<Ref> outputs;  // each a tuple of what `empty` takes
  Py_ssize_t num_results;
  std::vector<int> order;
  bool takes_workspace;
};

struct Table {
  const ExchangeApi* exchange;
  Ref empty, current_device, workspace;
  std::unordered_multimap<std::uint64_t, std::shared_ptr<const Entry>> entries;
  std::map<int, Ref> default_workspaces;  // by device
};

// A call's arguments, read.
struct Request {
  Key key;
  Pointer addresses[kMaxAddresses];
  Pointer all_addresses = 0;  // their bits
  ExchangeDevice device{-1, -1};
};

bool read_tensor(const Table& table, PyObject* object, ExchangeTensor* tensor) {
  return table.exchange->tensor_from_py_object(object, tensor) == 0;
}

Pointer address_of(const ExchangeTensor& tensor) {
  return reinterpret_cast<Pointer>(tensor.data) + tensor.byte_offset;
}

bool add_tensor(const ExchangeTensor& tensor, Request* request, Pointer* address) {
  if (tensor.ndim > kMaxDims) return false;
  const std::int64_t looks[] = {
      kTensor | tensor.ndim << 8 | tensor.dtype_code << 16 | tensor.dtype_bits << 24,
      static_cast<std::int64_t>(tensor.device.type) << 32 | tensor.device.id};
  for (const std::int64_t word : looks) {
    if (!request->key.push(word)) return false;
  }
  for (int dim = 0; dim < tensor.ndim; ++dim) {
    if (!request->key.push(tensor.shape[dim]) || !request->key.push(tensor.strides[dim])) {
      return false;
    }
  }
  if (request->device.type < 0) request->device = tensor.device;
  *address = address_of(tensor);
  request->all_addresses |= *address;
  return true;
}

bool add_scalar(Kind kind, std::int64_t value, Request* request) {
  return request->key.push(kind) && request->key.push(value);
}

// Whether a table can tell the argument from others; may leave Python's error set where not.
bool add_argument(const Table& table, PyObject* argument, Request* request, Pointer* address) {
  *address = 0;
  if (argument == Py_None) return request->key.push(kNone);
  if (PyBool_Check(argument)) return add_scalar(kBool, argument == Py_True, request);
  if (PyFloat_CheckExact(argument)) {
    const double value = PyFloat_AS_DOUBLE(argument);
    std::int64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return add_scalar(kFloat, bits, request);
  }
  if (PyLong_CheckExact(argument)) {
    const long long value = PyLong_AsLongLong(argument);
    return !(value == -1 && PyErr_Occurred()) && add_scalar(kInt, value, request);
  }
  ExchangeTensor tensor;
  return read_tensor(table, argument, &tensor) && add_tensor(tensor, request, address);
}

bool read_request(const Table& table, PyObject* const* arguments, Py_ssize_t count,
                  Request* request) {
  bool is_known = count <= kMaxArguments;
  for (Py_ssize_t i = 0; is_known && i < count; ++i) {
    is_known = add_argument(table, arguments[i], request, &request->addresses[i]);
  }
  if (!is_known) PyErr_Clear();
  return is_known && request->device.type >= 0;
}

std::shared_ptr<const Entry> find(const Table& table, const Key& key) {
  const auto [begin, end] = table.entries.equal_range(key.hash());
  for (auto it = begin; it != end; ++it) {
    if (key.equals(it->second->words)) return it->second;
  }
  return nullptr;
}

// -1 with Python's error set where there is none.
long current_device(const Table& table) {
  const Ref device(PyObject_CallNoArgs(table.current_device.get()));
  return device.get() == nullptr ? -1 : PyLong_AsLong(device.get());
}

// A reference to no object, with Python's error set, where it fails.
Ref shared_workspace(Table& table, int device, void* stream) {
  const auto found = table.default_workspaces.find(device);
  if (stream == nullptr && found != table.default_workspaces.end()) {
    return Ref::borrowed(found->second.get());
  }
  const auto number = static_cast<unsigned long long>(reinterpret_cast<Pointer>(stream));
  Ref workspace(PyObject_CallFunction(table.workspace.get(), "iK", device, number));
  if (stream == nullptr && workspace.get() != nullptr) {
    table.default_workspaces[device] = Ref::borrowed(workspace.get());
  }
  return workspace;
}

// Allocates the outputs, behind the addresses of count arguments.
bool allocate(const Table& table, const Entry& entry, Ref* outputs, Pointer* addresses) {
  for (std::size_t i = 0; i < entry.outputs.size(); ++i) {
    PyObject* const layout = entry.outputs[i].get();
    PyObject* const arguments[] = {PyTuple_GET_ITEM(layout, 0), PyTuple_GET_ITEM(layout, 1),
                                   PyTuple_GET_ITEM(layout, 2)};
    outputs[i] = Ref(PyObject_Vectorcall(table.empty.get(), arguments, 3, nullptr));
    ExchangeTensor tensor;
    if (outputs[i].get() == nullptr || !read_tensor(table, outputs[i].get(), &tensor)) return false;
    addresses[i] = address_of(tensor);
  }
  return true;
}

PyObject* make_call(Table& table, const Entry& entry, Request* request, Py_ssize_t count) {
  Ref outputs[kMaxOutputs];
  if (!allocate(table, entry, outputs, request->addresses + count)) return nullptr;
  void* stream = nullptr;
  const ExchangeDevice device = request->device;
  if (table.exchange->current_work_stream(device.type, device.id, &stream) != 0) return nullptr;
  Pointer* const more = request->addresses + count + entry.outputs.size();
  more[0] = reinterpret_cast<Pointer>(stream);
  more[1] = more[2] = 0;
  Ref workspace;  // held until the call is enqueued
  if (entry.takes_workspace) {
    workspace = shared_workspace(table, device.id, stream);
    ExchangeTensor tensor;
    if (workspace.get() == nullptr || !read_tensor(table, workspace.get(), &tensor)) return nullptr;
    more[1] = address_of(tensor);
  }
  Pointer ordered[kMaxAddresses];
  for (std::size_t i = 0; i < entry.order.size(); ++i) {
    ordered[i] = request->addresses[entry.order[i]];
  }
  if (!entry.prepared->run(entry.prepared, ordered)) return nullptr;
  Ref results(PyTuple_New(entry.num_results));
  if (results.get() == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < entry.num_results; ++i) {
    PyTuple_SET_ITEM(results.get(), i, outputs[i].release());
  }
  return results.release();
}

Table* table_of(PyObject* capsule) {
  return static_cast<Table*>(PyCapsule_GetPointer(capsule, nullptr));
}

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  Table* const table = table_of(self);
  if (table == nullptr) return nullptr;
  Request request;
  if (!read_request(*table, arguments, count, &request)) Py_RETURN_NONE;
  if (request.all_addresses % kAlignment != 0) Py_RETURN_NONE;
  // Held, as an allocation may run other threads, which may make the table forget it.
  const std::shared_ptr<const Entry> entry = find(*table, request.key);
  if (entry == nullptr) Py_RETURN_NONE;
  const long device = current_device(*table);
  if (device == -1 && PyErr_Occurred()) return nullptr;
  if (device != request.device.id) Py_RETURN_NONE;
  return make_call(*table, *entry, &request, count);
}

PyObject* wrong(const char* message) {
  PyErr_SetString(PyExc_ValueError, message);
  return nullptr;
}

// Fills in what `remember` was given; false, with Python's error set, where it is wrong.
bool read_entry(PyObject* run, PyObject* outputs, PyObject* order, Py_ssize_t count, Entry* entry) {
  entry->prepared = nullptr;
  if (PyCFunction_Check(run) && PyCFunction_GetSelf(run) != nullptr) {
    entry->prepared = static_cast<const PreparedCall*>(
        PyCapsule_GetPointer(PyCFunction_GetSelf(run), kPreparedCapsule));
  }
  if (entry->prepared == nullptr) return wrong("run must be a prepared call") != nullptr;
  entry->run = Ref::borrowed(run);
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
  if (PyTuple_GET_SIZE(order) != entry->prepared->num_addresses) {
    return wrong("order must have a place for each address of the call") != nullptr;
  }
  const long workspace = static_cast<long>(count + num_outputs + 1);
  entry->takes_workspace = false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(order); ++i) {
    const long place = PyLong_AsLong(PyTuple_GET_ITEM(order, i));
    if (place == -1 && PyErr_Occurred()) return false;
    if (place < 0 || place > workspace + 1)
      return wrong("order has a place that is none") != nullptr;
    entry->takes_workspace |= place == workspace;
    entry->order.push_back(static_cast<int>(place));
  }
  return true;
}

PyObject* remember(PyObject* self, PyObject* given) {
  Table* const table = table_of(self);
  if (table == nullptr) return nullptr;
  PyObject *arguments, *run, *outputs, *order;
  auto entry = std::make_shared<Entry>();
  if (!PyArg_ParseTuple(given, "O!OO!nO!", &PyTuple_Type, &arguments, &run, &PyTuple_Type, &outputs,
                        &entry->num_results, &PyTuple_Type, &order)) {
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
  if (!read_entry(run, outputs, order, count, entry.get())) return nullptr;
  std::vector<PyObject*> listed;
  for (Py_ssize_t i = 0; i < count; ++i) listed.push_back(PyTuple_GET_ITEM(arguments, i));
  Request request;
  if (!read_request(*table, listed.data(), count, &request)) Py_RETURN_NONE;
  if (find(*table, request.key) != nullptr) Py_RETURN_NONE;
  entry->words = request.key.words();
  decltype(table->entries) forgotten;  // freed last: that may run Python
  if (table->entries.size() >= kMaxEntries) forgotten.swap(table->entries);
  table->entries.emplace(request.key.hash(), std::move(entry));
  Py_RETURN_NONE;
}

PyMethodDef kCall = {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                     METH_FASTCALL, "Make a call that was made before, or return None."};
PyMethodDef kRemember = {"remember", &remember, METH_VARARGS,
                         "remember(arguments, run, outputs, num_results, order)"};

}  // namespace

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
  const Ref capsule(PyCapsule_New(table.get(), nullptr, [](PyObject* self) {
    delete static_cast<Table*>(PyCapsule_GetPointer(self, nullptr));
  }));
  if (capsule.get() == nullptr) return nullptr;
  table.release();
  const Ref functions[] = {Ref(PyCFunction_New(&kCall, capsule.get())),
                           Ref(PyCFunction_New(&kRemember, capsule.get()))};
  if (functions[0].get() == nullptr || functions[1].get() == nullptr) return nullptr;
  return PyTuple_Pack(2, functions[0].get(), functions[1].get());
}
