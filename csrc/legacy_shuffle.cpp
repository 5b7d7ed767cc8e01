#include "legacy_shuffle.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace aquila {

namespace {

// Partners drawn before their elements are exchanged: by then the cache lines have come, which is most of the time.
constexpr int64_t kAhead = 64;
constexpr int64_t kReportEvery = int64_t{1} << 24;

// All ones, down from the highest bit of value.
uint64_t mask_of(uint64_t value) {
  for (int shift = 1; shift < 64; shift *= 2) value |= value >> shift;
  return value;
}

}  // namespace

uint64_t LegacyShuffle::word(bool wide) {
  const uint64_t first = random_();
  return wide ? first << 32 | random_() : first;
}

template <typename T>
void LegacyShuffle::shuffle(Span<T> values, const Report& report) {
  std::array<int64_t, kAhead> partners;
  int64_t unreported = 0;
  for (int64_t last = values.size - 1; last > 0;) {
    const uint64_t mask = mask_of(static_cast<uint64_t>(last));
    const bool wide = mask > 0xffffffffu;
    const int64_t count = std::min(kAhead, last - static_cast<int64_t>(mask >> 1));  // places of the same mask
    for (int64_t k = 0; k < count;) {
      partners[k] = static_cast<int64_t>(word(wide) & mask);
      k += partners[k] <= last - k;  // no branch: whether a word is too large cannot be foretold
    }
    for (int64_t k = 0; k < count; ++k) __builtin_prefetch(&values[partners[k]], 1);
    for (int64_t k = 0; k < count; ++k) std::swap(values[last - k], values[partners[k]]);
    last -= count;
    unreported += count;
    if (unreported >= kReportEvery) {
      report(unreported);
      unreported = 0;
    }
  }
  report(unreported);
}

template void LegacyShuffle::shuffle<int32_t>(Span<int32_t>, const Report&);
template void LegacyShuffle::shuffle<uint32_t>(Span<uint32_t>, const Report&);
template void LegacyShuffle::shuffle<int64_t>(Span<int64_t>, const Report&);

}  // namespace aquila
