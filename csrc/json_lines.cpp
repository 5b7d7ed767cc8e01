#include "json_lines.hpp"

#include <cstring>

#include "breaks.hpp"

namespace aquila {

namespace {

constexpr int kDeepest = 64;            // objects and arrays within each other
constexpr int64_t kLongestNumber = 64;  // Python refuses an integer of thousands of digits
constexpr uint32_t kNone = 0xFFFFFFFFu;

bool is_space(uint8_t c) { return c == ' ' || c == '\t' || c == '\r'; }
bool is_digit(uint8_t c) { return c >= '0' && c <= '9'; }

// Eight bytes of which none is a quote, a backslash, a control character or part of a longer character.
bool all_plain(uint64_t word) {
  constexpr uint64_t ones = 0x0101010101010101u, highs = 0x8080808080808080u;
  const auto has_zero = [](uint64_t w) { return (w - ones) & ~w & highs; };
  const uint64_t below_space = (word - ones * 0x20) & ~word & highs;
  return ((word & highs) | below_space | has_zero(word ^ ones * '"') | has_zero(word ^ ones * '\\')) == 0;
}

// Takes the text and throws it away.
struct Nowhere {
  bool ascii(uint8_t) { return true; }
  void eight(const uint8_t*) {}
  bool wide(uint32_t, const uint8_t*, int) { return true; }
};

// Writes the text with its marks.
struct Writer {
  const JoinRules& rules;
  uint8_t* at;
  uint32_t before = 0;  // the character before, 0 where it is not Han

  bool ascii(uint8_t c) {
    if (c == rules.border || c == rules.mark) return false;
    *at++ = c;
    before = 0;
    return true;
  }
  void eight(const uint8_t* from) {
    std::memcpy(at, from, 8);
    at += 8;
    before = 0;
  }
  bool wide(uint32_t code, const uint8_t* from, int size) {
    const bool han = is_han(code);
    if (han && before != 0 && rules.table.size > 0) {
      *at = rules.mark;
      at += !holds_pair(rules.table.data, before, code);  // no branch: nobody can foretell a mark
    }
    std::memcpy(at, from, static_cast<size_t>(size));
    at += size;
    before = han ? code : 0;
    return true;
  }
};

// One line. Each function is past what it read where it returns true; false is a line that is not plain.
class Line {
 public:
  Line(const uint8_t* from, const uint8_t* end) : p_(from), end_(end) {}

  // An object with one string under the key, to `out`.
  bool document(const JoinRules& rules, Writer& out) {
    bool found = false;
    space();
    if (!take('{')) return false;
    space();
    if (take('}')) return false;
    do {
      std::string_view name;
      space();
      if (!plain_name(name)) return false;
      space();
      if (!take(':')) return false;
      space();
      if (name == rules.key) {
        if (found || !take('"') || !text(out)) return false;
        found = true;
      } else if (!value(1)) {
        return false;
      }
      space();
    } while (take(','));
    if (!take('}')) return false;
    space();
    return found && p_ == end_;
  }

 private:
  void space() {
    while (p_ < end_ && is_space(*p_)) ++p_;
  }
  bool take(uint8_t c) {
    if (p_ == end_ || *p_ != c) return false;
    ++p_;
    return true;
  }
  bool word(std::string_view said) {
    if (end_ - p_ < static_cast<int64_t>(said.size()) || std::memcmp(p_, said.data(), said.size()) != 0) return false;
    p_ += said.size();
    return true;
  }
  bool digits() {
    const uint8_t* first = p_;
    while (p_ < end_ && is_digit(*p_)) ++p_;
    return p_ > first;
  }

  // A key without escapes.
  bool plain_name(std::string_view& name) {
    if (!take('"')) return false;
    const uint8_t* first = p_;
    Nowhere nowhere;
    if (!text(nowhere)) return false;
    name = {reinterpret_cast<const char*>(first), static_cast<size_t>(p_ - first - 1)};
    return name.find('\\') == std::string_view::npos;
  }

  bool value(int depth) {
    if (p_ == end_ || depth > kDeepest) return false;
    switch (*p_) {
      case '"': {
        Nowhere nowhere;
        return take('"') && text(nowhere);
      }
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case 't':
        return word("true");
      case 'f':
        return word("false");
      case 'n':
        return word("null");
      default:
        return number();
    }
  }

  bool object(int depth) {
    take('{');
    space();
    if (take('}')) return true;
    do {
      Nowhere nowhere;
      space();
      if (!take('"') || !text(nowhere)) return false;
      space();
      if (!take(':')) return false;
      space();
      if (!value(depth + 1)) return false;
      space();
    } while (take(','));
    return take('}');
  }

  bool array(int depth) {
    take('[');
    space();
    if (take(']')) return true;
    do {
      space();
      if (!value(depth + 1)) return false;
      space();
    } while (take(','));
    return take(']');
  }

  bool number() {
    const uint8_t* first = p_;
    take('-');
    if (!take('0') && !digits()) return false;
    if (take('.') && !digits()) return false;
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      if (!digits()) return false;
    }
    return p_ - first <= kLongestNumber;
  }

  // The rest of a string, with its closing quote.
  template <typename Out>
  bool text(Out& out) {
    while (p_ < end_) {
      uint64_t eight = 0;
      while (end_ - p_ >= 8 && (std::memcpy(&eight, p_, 8), all_plain(eight))) {
        out.eight(p_);
        p_ += 8;
      }
      if (p_ == end_) return false;
      const uint8_t c = *p_;
      if (c >= 0x80) {
        if (!character(out)) return false;
      } else if (c == '"') {
        ++p_;
        return true;
      } else if (c == '\\') {
        if (!escape(out)) return false;
      } else {
        if (c < 0x20 || !out.ascii(c)) return false;
        ++p_;
      }
    }
    return false;
  }

  // A character of two to four bytes that is UTF-8.
  template <typename Out>
  bool character(Out& out) {
    const uint8_t c = *p_;
    const int size = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    if (c < 0xC2 || c > 0xF4 || end_ - p_ < size) return false;
    uint32_t code = c & (0xFFu >> (size + 1));
    for (int i = 1; i < size; ++i) {
      if ((p_[i] & 0xC0) != 0x80) return false;
      code = code << 6 | (p_[i] & 0x3Fu);
    }
    if (size == 3 && (code < 0x800 || (code >= 0xD800 && code < 0xE000))) return false;
    if (size == 4 && (code < 0x10000 || code > 0x10FFFF)) return false;
    if (!out.wide(code, p_, size)) return false;
    p_ += size;
    return true;
  }

  template <typename Out>
  bool escape(Out& out) {
    ++p_;
    if (p_ == end_) return false;
    switch (*p_++) {
      case '"':
        return out.ascii('"');
      case '\\':
        return out.ascii('\\');
      case '/':
        return out.ascii('/');
      case 'b':
        return out.ascii('\b');
      case 'f':
        return out.ascii('\f');
      case 'n':
        return out.ascii('\n');
      case 'r':
        return out.ascii('\r');
      case 't':
        return out.ascii('\t');
      case 'u':
        return code_point(out);
      default:
        return false;
    }
  }

  template <typename Out>
  bool code_point(Out& out) {
    uint32_t code = four_hex();
    if (code >= 0xD800 && code < 0xDC00) {
      if (!take('\\') || !take('u')) return false;
      const uint32_t low = four_hex();
      if (low < 0xDC00 || low > 0xDFFF) return false;
      code = 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00));
    } else if (code == kNone || (code >= 0xDC00 && code < 0xE000)) {
      return false;
    }
    if (code < 0x80) return out.ascii(static_cast<uint8_t>(code));
    uint8_t bytes[4];
    int size = 0;
    if (code < 0x800) {
      bytes[size++] = static_cast<uint8_t>(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        bytes[size++] = static_cast<uint8_t>(0xE0 | code >> 12);
      } else {
        bytes[size++] = static_cast<uint8_t>(0xF0 | code >> 18);
        bytes[size++] = static_cast<uint8_t>(0x80 | (code >> 12 & 0x3F));
      }
      bytes[size++] = static_cast<uint8_t>(0x80 | (code >> 6 & 0x3F));
    }
    bytes[size++] = static_cast<uint8_t>(0x80 | (code & 0x3F));
    return out.wide(code, bytes, size);
  }

  uint32_t four_hex() {
    if (end_ - p_ < 4) return kNone;
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const uint8_t c = *p_++, low = c | 0x20;
      if (!is_digit(c) && (low < 'a' || low > 'f')) return kNone;
      code = code << 4 | (is_digit(c) ? c - '0' : low - 'a' + 10u);
    }
    return code;
  }

  const uint8_t* p_;
  const uint8_t* end_;
};

}  // namespace

Joined join_lines(Span<const uint8_t> block, const JoinRules& rules, Span<uint8_t> out) {
  Joined done;
  const uint8_t* from = block.data;
  const uint8_t* const end = block.data + block.size;
  while (from < end && done.counted < rules.enough) {
    const auto* line_end = static_cast<const uint8_t*>(std::memchr(from, '\n', static_cast<size_t>(end - from)));
    if (line_end == nullptr || line_end - from > rules.longest) break;
    const uint8_t* first = from;
    while (first < line_end && is_space(*first)) ++first;
    if (first < line_end) {
      Writer writer{rules, out.data + done.written};
      if (!Line(first, line_end).document(rules, writer)) break;
      *writer.at++ = rules.border;
      done.written = writer.at - out.data;
      done.counted += line_end - from + 1;
      ++done.documents;
    }
    ++done.lines;
    from = line_end + 1;
  }
  done.bytes = from - block.data;
  return done;
}

}  // namespace aquila
