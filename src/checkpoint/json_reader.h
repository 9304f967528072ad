// json_reader.h - reads JSON that may be hostile, front to back, without building a tree.
//
//   JsonReader json(text, "model.safetensors");
//   json.object([&](const std::string& key) { if (key == "shape") ... else json.skip(); });
//   json.finish();
//
// Stricter than JSON itself: a key that occurs twice in one object is an error, nesting is limited,
// strings must be valid UTF-8. Python, which writes config.json, has the numbers NaN, Infinity and
// -Infinity, too: a dialect. Errors name the source and the byte. They are kCorruptFile, except for
// JSON that is sound and beyond a limit of this reader, which is kUnsupported.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>

namespace sluice {

class JsonReader {
 public:
  /// Deeper nesting is refused. safetensors needs 3, published config.json files fewer than 8.
  static constexpr int kMaxDepth = 32;

  enum class Kind { kObject, kArray, kString, kNumber, kBool, kNull };
  enum class Dialect { kStrict, kPython };

  /// Borrows `text` for its lifetime.
  JsonReader(std::string_view text, std::string source, Dialect dialect = Dialect::kStrict);

  /// What the next value is, judged by its first character.
  [[nodiscard]] Kind peek();
  /// Calls `member(key)` for each member; it must consume exactly the member's value.
  template <class Member>
  void object(Member&& member) {
    if (!open('{', '}')) return;
    std::unordered_set<std::string> seen;
    do {
      const auto [key, is_new] = seen.insert(string());
      if (!is_new) error("key '" + *key + "' occurs twice");
      expect(':');
      member(*key);
    } while (another('}'));
  }
  /// Calls `element()` for each element; it must consume exactly one value.
  template <class Element>
  void array(Element&& element) {
    if (!open('[', ']')) return;
    do {
      element();
    } while (another(']'));
  }
  [[nodiscard]] std::string string();
  /// A whole number in [0, 2^64): no sign, no fraction, no exponent.
  [[nodiscard]] std::uint64_t unsigned_integer();
  /// Throws: kUnsupported for a number beyond the range of double.
  [[nodiscard]] double number();
  [[nodiscard]] bool boolean();
  /// Consumes any one value.
  void skip();
  /// Consumes any one value and gives its text as it stands.
  [[nodiscard]] std::string_view raw();
  /// Only whitespace may follow.
  void finish();

  [[noreturn]] void error(const std::string& what) const;
  /// The JSON is sound, but beyond what this reader takes.
  [[noreturn]] void beyond_limit(const std::string& what) const;

 private:
  [[nodiscard]] bool open(char begin, char end);
  [[nodiscard]] bool another(char end);
  void skip_space() noexcept;
  void expect(char c);
  void literal(std::string_view word);
  [[nodiscard]] std::string_view number_text();
  [[nodiscard]] std::size_t word_size() const noexcept;
  void append_escape(std::string& out);
  void append_utf8(std::string& out);
  [[nodiscard]] std::uint32_t hex4();

  std::string_view text_;
  std::string source_;
  Dialect dialect_;
  std::size_t at_ = 0;
  int depth_ = 0;
};

/// `text`, which is UTF-8, as a JSON string with its quotes. Characters that JSON does not allow in
/// a string are escaped; everything else stands as it is.
[[nodiscard]] std::string json_string(std::string_view text);

}  // namespace sluice
