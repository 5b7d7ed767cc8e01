#include "sample_index.hpp"

#include <stdexcept>
#include <string>

namespace aquila {

namespace {

constexpr int64_t kAhead = 32;  // documents whose lengths are fetched before they are needed: the order is random

int64_t length_at(Span<const int32_t> lengths, Span<const int32_t> documents, int64_t position) {
  if (position >= documents.size) {
    throw std::invalid_argument("the documents hold fewer tokens than the samples need");
  }
  if (position + kAhead < documents.size) __builtin_prefetch(lengths.data + documents[position + kAhead]);
  const int64_t document = documents[position];
  if (document < 0 || document >= lengths.size) {
    throw std::invalid_argument("document " + std::to_string(document) + " does not exist: there are " +
                                std::to_string(lengths.size));
  }
  return lengths[document];
}

}  // namespace

template <typename T>
void fill_sample_index(Span<const int32_t> lengths, Span<const int32_t> documents, int64_t seq_len,
                       Span<T> sample_index) {
  int64_t position = 0;  // in documents
  int64_t begin = 0;     // tokens before documents[position]
  sample_index[0] = 0;
  sample_index[1] = 0;
  for (int64_t row = 1; 2 * row < sample_index.size; ++row) {
    const int64_t target = row * seq_len;
    int64_t length = length_at(lengths, documents, position);
    while (begin + length <= target) {
      begin += length;
      length = length_at(lengths, documents, ++position);
    }
    sample_index[2 * row] = static_cast<T>(position);
    sample_index[2 * row + 1] = static_cast<T>(target - begin);
  }
}

template void fill_sample_index<int32_t>(Span<const int32_t>, Span<const int32_t>, int64_t, Span<int32_t>);
template void fill_sample_index<int64_t>(Span<const int32_t>, Span<const int32_t>, int64_t, Span<int64_t>);

}  // namespace aquila
