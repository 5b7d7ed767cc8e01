#include "breaks.hpp"

namespace aquila {

int64_t insert_breaks(Span<const uint8_t> text, Span<const uint8_t> table, uint8_t mark, Span<uint8_t> out) {
  int64_t written = 0;
  uint32_t before = 0;  // the character before, 0 where it is not Han
  for (int64_t i = 0; i < text.size;) {
    const uint8_t lead = text[i];
    if (lead < 0xE3 || lead > 0xE9 || i + 2 >= text.size) {
      out[written++] = lead;
      before = 0;
      ++i;
      continue;
    }
    const uint32_t code = (lead & 0x0Fu) << 12 | (text[i + 1] & 0x3Fu) << 6 | (text[i + 2] & 0x3Fu);
    const bool han = is_han(code);
    if (han && before != 0 && !holds_pair(table.data, before, code)) out[written++] = mark;
    out[written++] = lead;
    out[written++] = text[i + 1];
    out[written++] = text[i + 2];
    before = han ? code : 0;
    i += 3;
  }
  return written;
}

}  // namespace aquila
