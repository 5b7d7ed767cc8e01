// The texts of lines of JSON end to end, as an encoder takes them, without an object for each.
#pragma once

#include <cstdint>
#include <string_view>

#include "span.hpp"

namespace aquila {

// What is taken: the string under `key`, of lines of at most `longest` bytes, until they have `enough` together. Behind
// each text comes `border`; between two Han characters whose pair is not in `table` (see breaks.hpp) comes `mark`, or
// nothing where it is empty.
struct JoinRules {
  std::string_view key;
  int64_t longest, enough;
  uint8_t border, mark;
  Span<const uint8_t> table;
};

// How much of a block was read: `bytes` of it, `lines`, the `documents` in these, the `counted` bytes of lines that are
// not blank; and what was `written` of the texts.
struct Joined {
  int64_t bytes = 0, lines = 0, documents = 0, counted = 0, written = 0;
};

// Reads whole lines until there is enough, or one is not plain: one that is no JSON object with one string under the
// key, holds `border` or `mark`, or is anything at all that another reader might judge otherwise. Such a line, and all
// behind it, is left to the caller. `out` holds twice what `enough` and one line more have, or `block`, and a byte.
Joined join_lines(Span<const uint8_t> block, const JoinRules& rules, Span<uint8_t> out);

}  // namespace aquila
