#include "sample_index.hpp"

#include <stdexcept>
#include <string>

namespace aquila {

namespace {

constexpr int64_t kAhead = 32;  // documents whose lengths are fetched before they are needed: the order is random

int64_t length_of(Unaligned<int32_t> lengths, int64_t document) {
  if (document < 0 || document >= lengths.size) {
    throw std::invalid_argument("document " + std::to_string(document) + " does not exist: there are " +
                                std::to_string(lengths.size));
  }
  return lengths[document];
}

}  // namespace

template <typename T>
void fill_sample_index(Unaligned<int32_t> lengths, Span<const int32_t> documents, int64_t seq_len, Place start,
                       Span<T> sample_index) {
  int64_t wanted = seq_len + start.token;  // how far from the document at hand the next row is
  int64_t written = 0;
  for (int64_t position = start.document; written < sample_index.size; ++position) {
    if (position >= documents.size) {
      throw std::invalid_argument("the documents hold fewer tokens than the samples need");
    }
    if (position + kAhead < documents.size) lengths.prefetch(documents[position + kAhead]);
    const int64_t length = length_of(lengths, documents[position]);
    // The first row is written in any case, and stays where it is in the document: whether cannot be foretold.
    do {
      sample_index[written] = static_cast<T>(position);
      sample_index[written + 1] = static_cast<T>(wanted);
      const bool inside = wanted < length;
      written += 2 * inside;
      wanted += inside ? seq_len : 0;
    } while (wanted < length && written < sample_index.size);
    wanted -= length;
  }
}

template void fill_sample_index<int32_t>(Unaligned<int32_t>, Span<const int32_t>, int64_t, Place, Span<int32_t>);
template void fill_sample_index<int64_t>(Unaligned<int32_t>, Span<const int32_t>, int64_t, Place, Span<int64_t>);

}  // namespace aquila
