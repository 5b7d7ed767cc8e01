#include "samples.hpp"

#include <cstring>
#include <stdexcept>

namespace aquila {

template <typename Token>
void read_sample(Span<const Token> tokens, Unaligned<int64_t> offsets, Unaligned<int32_t> lengths,
                 Span<const int32_t> order, SampleRange range, Span<int64_t> out) {
  if (range.first < 0 || range.last >= order.size) throw std::invalid_argument("a sample outside of the order");
  int64_t written = 0;
  for (int64_t place = range.first; place <= range.last; ++place) {
    const int64_t sequence = order[place];
    if (sequence < 0 || sequence >= lengths.size) throw std::invalid_argument("a sequence that does not exist");
    const int64_t start = place == range.first ? range.begin : 0;
    const int64_t stop = place == range.last ? range.end + 1 : lengths[sequence];
    const int64_t from = offsets[sequence] / static_cast<int64_t>(sizeof(Token)) + start;
    const int64_t count = stop - start;
    if (start < 0 || count < 0 || from < 0 || from + count > tokens.size || written + count > out.size) {
      throw std::invalid_argument("a sample outside of its tokens");
    }
    for (int64_t i = 0; i < count; ++i) out[written + i] = static_cast<int64_t>(tokens[from + i]);
    written += count;
  }
  if (written != out.size) throw std::invalid_argument("a sample of too few tokens");
}

#define AQUILA_READ(Token)                                                                                         \
  template void read_sample<Token>(Span<const Token>, Unaligned<int64_t>, Unaligned<int32_t>, Span<const int32_t>, \
                                   SampleRange, Span<int64_t>);
AQUILA_READ(uint8_t)
AQUILA_READ(int8_t)
AQUILA_READ(uint16_t)
AQUILA_READ(int16_t)
AQUILA_READ(int32_t)
AQUILA_READ(int64_t)
AQUILA_READ(float)
AQUILA_READ(double)
#undef AQUILA_READ

int64_t lay_out(Span<const int64_t> samples, DocumentRules rules, BatchView view) {
  int64_t borders = 0;
  for (int64_t row = 0; row < view.batch; ++row) {
    const int64_t* sample = &samples[row * (view.seq_len + 1)];
    const int64_t at = row * view.seq_len;
    std::memcpy(view.tokens + at, sample, view.seq_len * sizeof(int64_t));
    std::memcpy(view.labels + at, sample + 1, view.seq_len * sizeof(int64_t));
    int64_t start = 0;  // of the document at hand
    for (int64_t i = 0; i < view.seq_len; ++i) {
      const bool starts = i == 0 || sample[i - 1] == rules.eod;
      if (starts && rules.reset_positions) start = i;
      if (starts && rules.reset_attention) view.bounds[borders++] = static_cast<int32_t>(at + i);
      view.positions[at + i] = i - start;
      view.loss_mask[at + i] = rules.mask_loss && sample[i] == rules.eod ? 0.0f : 1.0f;
    }
  }
  if (rules.reset_attention) view.bounds[borders++] = static_cast<int32_t>(view.batch * view.seq_len);
  return borders;
}

}  // namespace aquila
