// Where a run of Han characters may be cut without changing what a byte-level BPE makes of it.
#pragma once

#include <cstdint>

#include "span.hpp"

namespace aquila {

constexpr int kPairBits = 22;  // of the table of pairs: a bit for each hash

inline bool is_han(uint32_t code) { return (code >= 0x4E00 && code <= 0x9FFF) || (code >= 0x3400 && code <= 0x4DBF); }

// The place of a pair of code points in the table.
inline uint32_t pair_bit(uint32_t left, uint32_t right) {
  return ((left * 0x9E3779B1u) ^ (right * 0x85EBCA6Bu)) >> (32 - kPairBits);
}

// Copies UTF-8 to `out`, which holds twice as much, with `mark` between two Han characters whose pair is not in the
// table; returns the bytes written.
int64_t insert_breaks(Span<const uint8_t> text, Span<const uint8_t> table, uint8_t mark, Span<uint8_t> out);

}  // namespace aquila
