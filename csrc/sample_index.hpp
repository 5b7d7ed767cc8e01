#pragma once

#include "span.hpp"

namespace aquila {

// A token of documents laid end to end: the place of its document among them, and its own there.
struct Place {
  int64_t document, token;
};

// Where samples start when documents are laid end to end and cut every seq_len tokens.
//
// lengths: tokens of each sequence. documents: the order they are read in. start: where a sample starts. sample_index:
// rows of (position in documents, offset in that document), of the samples after that one; sample i holds the
// seq_len + 1 tokens from its row up to and including the next row. Throws std::invalid_argument if a document does not
// exist or the tokens run out. T is int32_t or int64_t.
template <typename T>
void fill_sample_index(Unaligned<int32_t> lengths, Span<const int32_t> documents, int64_t seq_len, Place start,
                       Span<T> sample_index);

extern template void fill_sample_index<int32_t>(Unaligned<int32_t>, Span<const int32_t>, int64_t, Place, Span<int32_t>);
extern template void fill_sample_index<int64_t>(Unaligned<int32_t>, Span<const int32_t>, int64_t, Place, Span<int64_t>);

}  // namespace aquila
