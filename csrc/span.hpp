// A view of memory somebody else owns; std::span is C++20.
#pragma once

#include <cstdint>

namespace aquila {

template <typename T>
struct Span {
  T* data;
  int64_t size;

  T& operator[](int64_t i) const { return data[i]; }
};

}  // namespace aquila
