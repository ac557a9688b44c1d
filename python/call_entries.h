// What a table of calls (call_table.h) keeps, for the two files that make them.
#pragma once

#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "call_request.h"
#include "ref.h"

struct Place {
  int index;  // in (*arguments, *outputs, stream, workspace, nothing)
  Pointer offset;
};

struct Step {
  Ref run;  // which owns what `prepared` points to
  const PreparedCall* prepared;
  std::vector<Place> order;
};

struct Entry {
  std::vector<std::int64_t> words;
  std::vector<Step> steps;
  std::vector<Ref> outputs;  // each a tuple of what `empty` takes
  Py_ssize_t num_results;
  bool takes_workspace;
  Ref given;  // what `known` returns
  PyObject* note() const { return PyTuple_GET_ITEM(given.get(), 3); }
};

struct Table {
  const ExchangeApi* exchange;
  Ref empty, current_device, workspace;
  std::unordered_multimap<std::uint64_t, std::shared_ptr<const Entry>> entries;
  std::map<int, Ref> default_workspaces;  // by device
};

// Of a function that make_call_table made; null, with Python's error set, of another.
Table* table_of(PyObject* function);

// Held by the caller, as an allocation may run other threads, which may make the table forget it.
std::shared_ptr<const Entry> find(const Table& table, const Key& key);

enum class Answer { kYes, kNo, kError };  // kError: with Python's error set

// Whether the kernels can read the tensors where they are.
Answer is_ready(const Table& table, const Request& request);

// The tuple of the results; null, with Python's error set, where it fails.
PyObject* make_call(Table& table, const Entry& entry, Request* request);

// As `call` of call_table.h, of a tuple's or array's items.
PyObject* call_again(Table& table, PyObject* const* arguments, Py_ssize_t count);
