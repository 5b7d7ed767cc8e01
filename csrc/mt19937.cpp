#include "mt19937.hpp"

#include <algorithm>

namespace aquila {

namespace {

constexpr int64_t kShift = 397;  // how far ahead a word's partner lies

// What a word takes from itself, the word after it and its partner.
uint32_t twisted(uint32_t own, uint32_t after, uint32_t partner) {
  const uint32_t joined = (own & 0x80000000u) | (after & 0x7fffffffu);
  return partner ^ joined >> 1 ^ ((0u - (joined & 1u)) & 0x9908b0dfu);
}

uint32_t tempered(uint32_t word) {
  word ^= word >> 11;
  word ^= word << 7 & 0x9d2c5680u;
  word ^= word << 15 & 0xefc60000u;
  return word ^ word >> 18;
}

}  // namespace

Mt19937::Mt19937(uint32_t seed) {
  state_[0] = seed;
  for (uint32_t i = 1; i < kWords; ++i) state_[i] = 1812433253u * (state_[i - 1] ^ state_[i - 1] >> 30) + i;
}

const uint32_t* Mt19937::words(int64_t most, int64_t* count) {
  if (next_ == kWords) refill();
  *count = std::min(most, kWords - next_);
  next_ += *count;
  return &words_[next_ - *count];
}

void Mt19937::refill() {
  uint32_t* state = state_.data();
  for (int64_t i = 0; i < kWords - kShift; ++i) state[i] = twisted(state[i], state[i + 1], state[i + kShift]);
  for (int64_t i = kWords - kShift; i < kWords - 1; ++i) {
    state[i] = twisted(state[i], state[i + 1], state[i + kShift - kWords]);
  }
  state[kWords - 1] = twisted(state[kWords - 1], state[0], state[kShift - 1]);
  for (int64_t i = 0; i < kWords; ++i) words_[i] = tempered(state[i]);
  next_ = 0;
}

}  // namespace aquila
