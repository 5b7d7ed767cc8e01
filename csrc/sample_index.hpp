#pragma once

#include "span.hpp"

namespace aquila {

// Where each sample starts when documents are laid end to end and cut every seq_len tokens.
//
// lengths: tokens of each sequence. documents: the order they are read in. sample_index: (num_samples + 1) rows of
// (position in documents, offset in that document); sample i holds the seq_len + 1 tokens from row i up to and
// including row i + 1. Throws std::invalid_argument if a document does not exist or the tokens run out.
// T is int32_t or int64_t.
template <typename T>
void fill_sample_index(Span<const int32_t> lengths, Span<const int32_t> documents, int64_t seq_len,
                       Span<T> sample_index);

extern template void fill_sample_index<int32_t>(Span<const int32_t>, Span<const int32_t>, int64_t, Span<int32_t>);
extern template void fill_sample_index<int64_t>(Span<const int32_t>, Span<const int32_t>, int64_t, Span<int64_t>);

}  // namespace aquila
