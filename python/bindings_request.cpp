#include "call_request.h"

namespace {

enum Kind : std::int64_t { kNone, kBool, kInt, kFloat, kTensor, kText, kTuple };

bool add_tensor(const ExchangeTensor& tensor, Request* request, Py_ssize_t place) {
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
  const std::uint64_t bit = std::uint64_t{1} << place;
  request->tensors |= bit;
  if (tensor.ndim > 0 && tensor.strides[tensor.ndim - 1] != 1) request->with_gaps |= bit;
  if (request->device.type < 0) request->device = tensor.device;
  request->addresses[place] = address_of(tensor);
  request->all_addresses |= request->addresses[place];
  return true;
}

bool add_scalar(Kind kind, std::int64_t value, Key* key) {
  return key->push(kind) && key->push(value);
}

bool add_text(PyObject* text, Key* key) {
  Py_ssize_t size = 0;
  const char* const bytes = PyUnicode_AsUTF8AndSize(text, &size);
  if (bytes == nullptr || !add_scalar(kText, size, key)) return false;
  for (Py_ssize_t at = 0; at < size; at += 8) {
    std::int64_t word = 0;
    std::memcpy(&word, bytes + at, static_cast<std::size_t>(size - at < 8 ? size - at : 8));
    if (!key->push(word)) return false;
  }
  return true;
}

// Whether it is one, and the key has room.
bool add_value(PyObject* value, Key* key) {
  if (value == Py_None) return key->push(kNone);
  if (PyBool_Check(value)) return add_scalar(kBool, value == Py_True, key);
  if (PyFloat_CheckExact(value)) {
    const double number = PyFloat_AS_DOUBLE(value);
    std::int64_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    return add_scalar(kFloat, bits, key);
  }
  if (PyLong_CheckExact(value)) {
    const long long number = PyLong_AsLongLong(value);
    return !(number == -1 && PyErr_Occurred()) && add_scalar(kInt, number, key);
  }
  if (PyUnicode_CheckExact(value)) return add_text(value, key);
  if (!PyTuple_CheckExact(value)) return false;
  const Py_ssize_t size = PyTuple_GET_SIZE(value);
  bool is_known = size <= kMaxArguments && add_scalar(kTuple, size, key);
  for (Py_ssize_t i = 0; is_known && i < size; ++i) {
    PyObject* const item = PyTuple_GET_ITEM(value, i);
    is_known = !PyTuple_Check(item) && add_value(item, key);  // no deeper: it may be endless
  }
  return is_known;
}

bool is_tensor_like(PyObject* object) {
  return object != Py_None && !PyBool_Check(object) && !PyFloat_CheckExact(object) &&
         !PyLong_CheckExact(object) && !PyUnicode_CheckExact(object) && !PyTuple_CheckExact(object);
}

}  // namespace

bool read_tensor(const ExchangeApi& exchange, PyObject* object, ExchangeTensor* tensor) {
  return exchange.tensor_from_py_object(object, tensor) == 0;
}

bool read_request(const ExchangeApi& exchange, PyObject* const* arguments, Py_ssize_t count,
                  Request* request) {
  request->arguments = arguments;
  request->count = count;
  bool is_known = count <= kMaxArguments;
  for (Py_ssize_t i = 0; is_known && i < count; ++i) {
    request->addresses[i] = 0;
    ExchangeTensor tensor;
    is_known = is_tensor_like(arguments[i])
                   ? read_tensor(exchange, arguments[i], &tensor) && add_tensor(tensor, request, i)
                   : add_value(arguments[i], &request->key);
  }
  if (!is_known) PyErr_Clear();
  return is_known && request->device.type >= 0;
}
