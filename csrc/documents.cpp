#include "documents.hpp"

#include <stdexcept>

namespace aquila {

int64_t split_documents(Span<const uint32_t> ids, DocumentIds special, Span<uint32_t> tokens, Span<int64_t> lengths) {
  int64_t written = 0, begin = 0;  // tokens, and those before the document at hand
  int64_t documents = 0;
  for (int64_t i = 0; i < ids.size; ++i) {
    const int64_t id = ids[i];
    if (id != special.border) {
      tokens[written] = ids[i];
      written += id != special.mark;  // no branch: nobody can foretell a mark
      continue;
    }
    if (special.end >= 0 && written > begin) tokens[written++] = static_cast<uint32_t>(special.end);
    if (documents == lengths.size) throw std::invalid_argument("more borders than documents");
    lengths[documents++] = written - begin;
    begin = written;
  }
  if (documents != lengths.size || begin != written) {
    throw std::invalid_argument("fewer borders than documents");
  }
  return written;
}

}  // namespace aquila
