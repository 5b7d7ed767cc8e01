#pragma once

#include <array>
#include <cstdint>

namespace aquila {

// The words of std::mt19937, which are numpy's, a block at a time: in a whole block the compiler finds vectors.
class Mt19937 {
 public:
  static constexpr int64_t kWords = 624;

  explicit Mt19937(uint32_t seed);

  uint32_t word() {
    if (next_ == kWords) refill();
    return words_[next_++];
  }

  // At least one of the next words and at most `most`, which are then used up; sets how many.
  const uint32_t* words(int64_t most, int64_t* count);

 private:
  void refill();

  std::array<uint32_t, kWords> state_;
  std::array<uint32_t, kWords> words_;
  int64_t next_ = kWords;
};

}  // namespace aquila
