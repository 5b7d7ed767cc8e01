#include "legacy_shuffle.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace aquila {

namespace {

// Places whose partners are drawn before they are exchanged: by then the cache lines have come, most of the time.
constexpr int64_t kAhead = 128;
constexpr int64_t kReportEvery = int64_t{1} << 24;

// All ones, down from the highest bit of value.
uint64_t mask_of(uint64_t value) {
  for (int shift = 1; shift < 64; shift *= 2) value |= value >> shift;
  return value;
}

}  // namespace

LegacyShuffle::Block LegacyShuffle::draw(int64_t high, int64_t* partners) {
  if (high <= 1) return {high, high, partners};  // the place 0 has no partner
  int64_t place = high - 1;
  const uint64_t mask = mask_of(static_cast<uint64_t>(place));
  const int64_t low = std::max(high - kAhead, static_cast<int64_t>(mask >> 1) + 1);  // the same mask for all
  while (place >= low) {
    if (mask > 0xffffffffu) {
      const uint64_t first = random_.word();
      const auto drawn = static_cast<int64_t>((first << 32 | random_.word()) & mask);
      partners[place - low] = drawn;
      place -= drawn <= place;
      continue;
    }
    int64_t count = 0;
    const uint32_t* words = random_.words(place - low + 1, &count);  // so many are needed at least
    auto narrow = static_cast<uint32_t>(place);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t drawn = words[i] & static_cast<uint32_t>(mask);
      partners[static_cast<int64_t>(narrow) - low] = drawn;
      narrow -= drawn <= narrow;  // no branch: whether a word is too large cannot be foretold
    }
    place = narrow;
  }
  return {low, high, partners};
}

template <typename T>
void LegacyShuffle::shuffle(Span<T> values, const Report& report) {
  std::array<std::array<int64_t, kAhead>, 2> partners;  // one block is exchanged while the next one's cache lines come
  int64_t unreported = 0;
  Block next = draw(values.size, partners[0].data());
  for (int turn = 1; next.low < next.high; turn ^= 1) {
    const Block block = next;
    next = draw(block.low, partners[turn].data());
    for (int64_t i = 0; i < next.high - next.low; ++i) __builtin_prefetch(&values[next.partners[i]], 1);
    for (int64_t place = block.high - 1; place >= block.low; --place) {
      std::swap(values[place], values[block.partners[place - block.low]]);
    }
    unreported += block.high - block.low;
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
