// What an encoder's output of many documents end to end comes to.
#pragma once

#include <cstdint>

#include "span.hpp"

namespace aquila {

// Special ids among those of many documents: `border` ends each, `mark` is no token of a document. `end` is what a
// document with tokens ends with, -1 for nothing.
struct DocumentIds {
  int64_t border;
  int64_t mark;
  int64_t end;
};

// Copies the documents' tokens to `tokens`, which holds as many as `ids`, and how many are each one's to `lengths`;
// returns how many there are. Throws std::invalid_argument unless as many borders as lengths end it all.
int64_t split_documents(Span<const uint32_t> ids, DocumentIds special, Span<uint32_t> tokens, Span<int64_t> lengths);

}  // namespace aquila
