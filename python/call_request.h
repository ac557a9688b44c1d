// A call's arguments, read: what they look like, by which calls are told apart, and where they lie.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call_table.h"
#include "exchange.h"

constexpr int kMaxArguments = 32;
constexpr int kMaxOutputs = 10;
constexpr int kMaxAddresses = kMaxArguments + kMaxOutputs + 3;
constexpr int kMaxDims = 5;
constexpr int kMaxWords = 160;

// Kinds and values of scalars; of tensors all but the address.
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

struct Request {
  PyObject* const* arguments;
  Py_ssize_t count;
  Key key;
  Pointer addresses[kMaxAddresses];
  Pointer all_addresses = 0;      // their bits
  std::uint64_t tensors = 0;      // bits of the arguments that are tensors
  std::uint64_t with_gaps = 0;    // of those, the ones whose last dimension is not contiguous
  ExchangeDevice device{-1, -1};  // of the first tensor
};

bool read_tensor(const ExchangeApi& exchange, PyObject* object, ExchangeTensor* tensor);

inline Pointer address_of(const ExchangeTensor& tensor) {
  return reinterpret_cast<Pointer>(tensor.data) + tensor.byte_offset;
}

// Whether a table can tell the arguments from others; leaves no error behind.
bool read_request(const ExchangeApi& exchange, PyObject* const* arguments, Py_ssize_t count,
                  Request* request);
