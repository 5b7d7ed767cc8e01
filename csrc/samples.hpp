// Samples read from the tokens of a data set, and what a step needs to know of them.
#pragma once

#include <cstdint>

#include "span.hpp"

namespace aquila {

// Where a sample lies: from token `begin` of the sequence at place `first` of the order of sequences up to and with
// token `end` of that at `last`.
struct SampleRange {
  int64_t first, begin, last, end;
};

// The tokens of a sample, widened. offsets: the byte at which each sequence begins. Throws std::invalid_argument where
// the range leaves the order, a sequence or the tokens, or does not fill `out`.
template <typename Token>
void read_sample(Span<const Token> tokens, Unaligned<int64_t> offsets, Unaligned<int32_t> lengths,
                 Span<const int32_t> order, SampleRange range, Span<int64_t> out);

// What the end of a document means to the rest of its sample.
struct DocumentRules {
  int64_t eod;
  bool reset_positions, reset_attention, mask_loss;
};

// Views of [batch, seq_len] that are written; `bounds` holds batch * seq_len + 1.
struct BatchView {
  int64_t batch, seq_len;
  int64_t* tokens;
  int64_t* labels;
  float* loss_mask;
  int64_t* positions;
  int32_t* bounds;
};

// Inputs, labels, loss mask, positions and borders of documents of samples [batch, seq_len + 1]; returns how many
// borders there are, 0 where attention does not mind.
int64_t lay_out(Span<const int64_t> samples, DocumentRules rules, BatchView view);

}  // namespace aquila
