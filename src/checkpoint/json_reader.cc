#include "checkpoint/json_reader.h"

#include <charconv>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

bool is_digit(char c) noexcept {
  return c >= '0' && c <= '9';
}

void append_code_point(std::string& out, std::uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
    return;
  }
  const int num_tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  constexpr unsigned kLead[] = {0, 0xc0, 0xe0, 0xf0};
  out += static_cast<char>(kLead[num_tail] | code >> (6 * num_tail));
  for (int i = num_tail - 1; i >= 0; --i) {
    out += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3f));
  }
}

}  // namespace

JsonReader::JsonReader(std::string_view text, std::string source, Dialect dialect)
    : text_(text), source_(std::move(source)), dialect_(dialect) {}

void JsonReader::error(const std::string& what) const {
  fail(ErrorCode::kCorruptFile, "{}: JSON, byte {}: {}", source_, at_, what);
}

void JsonReader::beyond_limit(const std::string& what) const {
  fail(ErrorCode::kUnsupported, "{}: JSON, byte {}: {}", source_, at_, what);
}

void JsonReader::skip_space() noexcept {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) {
    ++at_;
  }
}

void JsonReader::expect(char c) {
  skip_space();
  if (at_ >= text_.size()) error(std::string("ends where '") + c + "' should stand");
  if (text_[at_] != c) error(std::string("'") + c + "' should stand here");
  ++at_;
}

bool JsonReader::open(char begin, char end) {
  expect(begin);
  if (++depth_ > kMaxDepth) beyond_limit("nested deeper than " + std::to_string(kMaxDepth));
  skip_space();
  if (at_ < text_.size() && text_[at_] == end) {
    ++at_, --depth_;
    return false;
  }
  return true;
}

bool JsonReader::another(char end) {
  skip_space();
  if (at_ < text_.size() && text_[at_] == ',') {
    ++at_;
    return true;
  }
  expect(end);
  --depth_;
  return false;
}

JsonReader::Kind JsonReader::peek() {
  skip_space();
  if (at_ >= text_.size()) error("ends where a value should stand");
  switch (text_[at_]) {
    case '{':
      return Kind::kObject;
    case '[':
      return Kind::kArray;
    case '"':
      return Kind::kString;
    case 't':
    case 'f':
      return Kind::kBool;
    case 'n':
      return Kind::kNull;
    default:
      if (text_[at_] == '-' || is_digit(text_[at_]) || word_size() > 0) return Kind::kNumber;
      error("no value begins like this");
  }
}

std::string JsonReader::string() {
  expect('"');
  std::string out;
  while (true) {
    if (at_ >= text_.size()) error("ends inside a string");
    const auto c = static_cast<unsigned char>(text_[at_]);
    if (c == '"') {
      ++at_;
      return out;
    }
    if (c < 0x20) error("control character inside a string");
    if (c == '\\') {
      append_escape(out);
    } else if (c < 0x80) {
      out += text_[at_++];
    } else {
      append_utf8(out);
    }
  }
}

/// One multi-byte UTF-8 sequence: shortest form, no surrogates, at most U+10FFFF.
void JsonReader::append_utf8(std::string& out) {
  const auto lead = static_cast<unsigned char>(text_[at_]);
  const int num_tail = lead >= 0xc2 && lead <= 0xdf   ? 1
                       : lead >= 0xe0 && lead <= 0xef ? 2
                       : lead >= 0xf0 && lead <= 0xf4 ? 3
                                                      : 0;
  if (num_tail == 0 || text_.size() - at_ <= static_cast<std::size_t>(num_tail)) {
    error("not valid UTF-8");
  }
  std::uint32_t code = lead & (0x3fU >> num_tail);
  for (int i = 1; i <= num_tail; ++i) {
    const auto tail = static_cast<unsigned char>(text_[at_ + static_cast<std::size_t>(i)]);
    if ((tail & 0xc0) != 0x80) error("not valid UTF-8");
    code = code << 6 | (tail & 0x3fU);
  }
  constexpr std::uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
  if (code < kSmallest[num_tail] || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) {
    error("not valid UTF-8");
  }
  out.append(text_, at_, static_cast<std::size_t>(num_tail) + 1);
  at_ += static_cast<std::size_t>(num_tail) + 1;
}

std::uint32_t JsonReader::hex4() {
  if (text_.size() - at_ < 4) error("ends inside an escape");
  std::uint32_t code = 0;
  const char* const begin = text_.data() + at_;
  const auto [end, problem] = std::from_chars(begin, begin + 4, code, 16);
  if (problem != std::errc{} || end != begin + 4) error("\\u needs four hexadecimal digits");
  at_ += 4;
  return code;
}

void JsonReader::append_escape(std::string& out) {
  ++at_;
  if (at_ >= text_.size()) error("ends inside an escape");
  constexpr std::string_view kNames = "\"\\/bfnrt";
  constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
  if (const auto i = kNames.find(text_[at_]); i != std::string_view::npos) {
    out += kValues[i];
    ++at_;
    return;
  }
  if (text_[at_] != 'u') error("unknown escape");
  ++at_;
  std::uint32_t code = hex4();
  if (code >= 0xd800 && code <= 0xdbff) {
    if (text_.substr(at_, 2) != "\\u") error("half a surrogate pair");
    at_ += 2;
    const std::uint32_t low = hex4();
    if (low < 0xdc00 || low > 0xdfff) error("half a surrogate pair");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  } else if (code >= 0xdc00 && code <= 0xdfff) {
    error("half a surrogate pair");
  }
  append_code_point(out, code);
}

/// Of Python's number that is a word here; 0 if none is.
std::size_t JsonReader::word_size() const noexcept {
  if (dialect_ == Dialect::kStrict) return 0;
  for (const std::string_view word : {"NaN", "Infinity", "-Infinity"}) {
    if (text_.substr(at_, word.size()) == word) return word.size();
  }
  return 0;
}

/// -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?
std::string_view JsonReader::number_text() {
  skip_space();
  const std::size_t begin = at_;
  if (const std::size_t size = word_size()) {
    at_ += size;
    return text_.substr(begin, size);
  }
  const auto digits = [&] {
    const std::size_t first = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    if (at_ == first) error("a digit should stand here");
  };
  const auto next_is = [&](char a, char b) {
    return at_ < text_.size() && (text_[at_] == a || text_[at_] == b);
  };
  if (next_is('-', '-')) ++at_;
  if (next_is('0', '0')) {
    ++at_;
    if (at_ < text_.size() && is_digit(text_[at_])) error("a number with a leading zero");
  } else {
    digits();
  }
  if (next_is('.', '.')) {
    ++at_;
    digits();
  }
  if (next_is('e', 'E')) {
    ++at_;
    if (next_is('+', '-')) ++at_;
    digits();
  }
  return text_.substr(begin, at_ - begin);
}

std::uint64_t JsonReader::unsigned_integer() {
  const std::string_view text = number_text();
  std::uint64_t value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc{} || end != text.data() + text.size()) {
    error("'" + std::string(text.substr(0, 32)) + "' is not a whole number in [0, 2^64)");
  }
  return value;
}

double JsonReader::number() {
  const std::string_view text = number_text();
  double value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc{} || end != text.data() + text.size()) {
    beyond_limit("'" + std::string(text.substr(0, 32)) + "' does not fit a double");
  }
  return value;
}

void JsonReader::literal(std::string_view word) {
  skip_space();
  if (text_.substr(at_, word.size()) != word) error("unknown word");
  at_ += word.size();
}

bool JsonReader::boolean() {
  const bool value = peek() == Kind::kBool && text_[at_] == 't';
  literal(value ? "true" : "false");
  return value;
}

void JsonReader::skip() {
  switch (peek()) {
    case Kind::kObject:
      return object([this](const std::string&) { skip(); });
    case Kind::kArray:
      return array([this] { skip(); });
    case Kind::kString:
      (void)string();
      return;
    case Kind::kNumber:
      (void)number_text();
      return;
    case Kind::kBool:
      (void)boolean();
      return;
    case Kind::kNull:
      return literal("null");
  }
}

std::string_view JsonReader::raw() {
  skip_space();
  const std::size_t begin = at_;
  skip();
  return text_.substr(begin, at_ - begin);
}

void JsonReader::finish() {
  skip_space();
  if (at_ != text_.size()) error("something follows the end of the document");
}

std::string json_string(std::string_view text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      json += '\\';
      json += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      json += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      json += c;
    }
  }
  return json + '"';
}

}  // namespace sluice
