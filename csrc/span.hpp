// Views of memory somebody else owns; std::span is C++20.
#pragma once

#include <cstdint>
#include <cstring>

namespace aquila {

template <typename T>
struct Span {
  T* data;
  int64_t size;

  T& operator[](int64_t i) const { return data[i]; }
};

// Values of a file that may lie at any byte.
template <typename T>
struct Unaligned {
  const char* data;
  int64_t size;

  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }

  // A hint that a value will be read soon; any `i` may be given.
  void prefetch(int64_t i) const {
    __builtin_prefetch(
        reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(i) * sizeof(T)));
  }
};

}  // namespace aquila
