#include "legacy_shuffle.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace aquila {

namespace {

// Partners drawn before their elements are exchanged: by then the cache lines have come, which is most of the time.
constexpr int64_t kAhead = 128;
constexpr int64_t kReportEvery = int64_t{1} << 24;

// All ones, down from the highest bit of value.
uint64_t mask_of(uint64_t value) {
  for (int shift = 1; shift < 64; shift *= 2) value |= value >> shift;
  return value;
}

}  // namespace

// Partners of the places from `last` down to `low`; partners[i] is that of the place low + i.
void LegacyShuffle::draw(int64_t last, int64_t low, int64_t* partners) {
  const uint64_t mask = mask_of(static_cast<uint64_t>(last));
  while (last >= low) {
    if (mask > 0xffffffffu) {
      const uint64_t high = random_.word();
      const auto drawn = static_cast<int64_t>((high << 32 | random_.word()) & mask);
      partners[last - low] = drawn;
      last -= drawn <= last;
      continue;
    }
    int64_t count = 0;
    const uint32_t* words = random_.words(last - low + 1, &count);  // so many are needed at least
    auto place = static_cast<uint32_t>(last);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t drawn = words[i] & static_cast<uint32_t>(mask);
      partners[static_cast<int64_t>(place) - low] = drawn;
      place -= drawn <= place;  // no branch: whether a word is too large cannot be foretold
    }
    last = place;
  }
}

template <typename T>
void LegacyShuffle::shuffle(Span<T> values, const Report& report) {
  std::array<std::array<int64_t, kAhead>, 2> blocks;  // one is exchanged while the cache lines of the next one come
  int64_t unreported = 0;
  int64_t drawn = values.size;  // all places from here on have partners, and have exchanged from `done` on
  for (int64_t done = drawn, turn = 0; done > 1; turn ^= 1) {
    const int64_t last = drawn - 1;
    if (last > 0) {
      drawn = std::max(last - kAhead, static_cast<int64_t>(mask_of(last) >> 1)) + 1;  // the same mask for all
      draw(last, drawn, blocks[turn].data());
      for (int64_t i = 0; i <= last - drawn; ++i) __builtin_prefetch(&values[blocks[turn][i]], 1);
    }
    for (int64_t place = done - 1; place > last; --place)
      std::swap(values[place], values[blocks[turn ^ 1][place - last - 1]]);
    unreported += done - last - 1;
    done = last + 1;
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
