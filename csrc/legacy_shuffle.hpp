#pragma once

#include <functional>

#include "mt19937.hpp"
#include "span.hpp"

namespace aquila {

// Called with how many elements were handled since the last call; may throw, which ends the work.
using Report = std::function<void(int64_t)>;

// numpy.random.RandomState(seed).shuffle, value for value; one after the other they continue the same stream.
//
// numpy walks down from the last element, and draws a partner by masking random words until one is not too large: of 32
// bits where the partner's index fits, else of two words, the high one first.
class LegacyShuffle {
 public:
  explicit LegacyShuffle(uint32_t seed) : random_(seed) {}

  template <typename T>
  void shuffle(Span<T> values, const Report& report);

 private:
  // Places from `low` up to but without `high`; partners[i] is what the place low + i is exchanged with, the highest
  // place first.
  struct Block {
    int64_t low, high;
    const int64_t* partners;
  };

  // The next places below `high`, none where there are none; `partners` holds kAhead.
  Block draw(int64_t high, int64_t* partners);

  Mt19937 random_;
};

extern template void LegacyShuffle::shuffle<int32_t>(Span<int32_t>, const Report&);
extern template void LegacyShuffle::shuffle<uint32_t>(Span<uint32_t>, const Report&);
extern template void LegacyShuffle::shuffle<int64_t>(Span<int64_t>, const Report&);

}  // namespace aquila
