#include "checkpoint/file_kind.h"

#include <algorithm>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::string_view kJson = "JSON text";

}  // namespace

std::string_view kind_of_file(std::string_view file) noexcept {
  constexpr std::pair<std::string_view, std::string_view> kKinds[] = {
      {"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the file itself"},
      {"<", "a page of HTML or XML, as a download that failed leaves it"},
      {"{", kJson},
      {"\xef\xbb\xbf", "text behind a byte order mark (BOM); save it as UTF-8 without one"},
      {"PK\x03\x04", "a zip archive (of PyTorch?)"},
      {"GGUF", "a GGUF file"}};
  const std::size_t first = std::min(file.find_first_not_of(" \t\r\n"), file.size());
  for (const auto& [magic, kind] : kKinds) {
    if (file.substr(first).starts_with(magic)) return kind;
  }
  return {};
}

void check_is_json(std::string_view text, const std::string& source) {
  const std::string_view kind = kind_of_file(text);
  if (kind.empty() || kind == kJson) return;
  fail(ErrorCode::kUnsupported, "{}: is no JSON, but {}", source, kind);
}

}  // namespace sluice
