// Where a run of Han characters may be cut without changing what a byte-level BPE makes of it.
#pragma once

#include <cstdint>

#include "span.hpp"

namespace aquila {

// The table of pairs is a Bloom filter: two bits a pair, both in one line of 64 bytes, which memory gives at once.
constexpr int kLineBits = 13;
constexpr int64_t kTableBytes = int64_t{64} << kLineBits;

inline bool is_han(uint32_t code) { return (code >= 0x4E00 && code <= 0x9FFF) || (code >= 0x3400 && code <= 0x4DBF); }

// Whether two Han characters are in the table; one pair in some hundreds is taken for one that is, and only costs a
// cut.
inline bool holds_pair(const uint8_t* table, uint32_t left, uint32_t right) {
  const uint64_t hash = (uint64_t{left} << 16 | right) * 0x9E3779B97F4A7C15u;
  const uint8_t* line = table + 64 * (hash >> (64 - kLineBits));
  const uint32_t first = hash >> 40 & 511, second = hash >> 31 & 511;
  return (line[first >> 3] >> (first & 7) & line[second >> 3] >> (second & 7) & 1) != 0;
}

// Copies UTF-8 to `out`, which holds twice as much, with `mark` between two Han characters whose pair is not in the
// table; returns the bytes written.
int64_t insert_breaks(Span<const uint8_t> text, Span<const uint8_t> table, uint8_t mark, Span<uint8_t> out);

}  // namespace aquila
