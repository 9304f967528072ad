#include "convert/journal.h"

#include <charconv>
#include <string>
#include <string_view>

#include "core/fail.h"
#include "core/regular_file.h"
#include "files/file_write.h"

namespace sluice {
namespace {

std::string head_line(std::uint64_t conversion) {
  return fmt::format("sluice-convert 2 {:016x}\n", conversion);
}

/// " <16 hexadecimal digits>"; false for anything else.
bool parse_digest(std::string_view text, std::uint64_t& digest) {
  if (text.size() != 17 || text.front() != ' ') return false;
  const auto [last, problem] = std::from_chars(text.begin() + 1, text.end(), digest, 16);
  return problem == std::errc{} && last == text.end();
}

/// "<job> <digest> <digest>"; false for anything else.
bool parse_line(std::string_view line, std::size_t& job, Journal::Done& done) {
  const auto [after, problem] = std::from_chars(line.begin(), line.end(), job);
  if (problem != std::errc{}) return false;
  line.remove_prefix(static_cast<std::size_t>(after - line.begin()));
  return line.size() == 34 && parse_digest(line.substr(0, 17), done.bytes) &&
         parse_digest(line.substr(17), done.source);
}

}  // namespace

Journal::Journal(const std::filesystem::path& dir, std::uint64_t conversion)
    : path_(dir / kFileName) {
  const std::string head = head_line(conversion);
  if (!std::filesystem::exists(path_)) write_new_text(path_, head);
  const std::string text = read_text(path_);
  if (!text.starts_with(head)) {
    fail(ErrorCode::kInvalidArgument,
         "{}: holds an unfinished conversion of another source or with other options; finish it as "
         "it was begun, or remove the directory",
         dir.string());
  }
  // After a line that was cut short, so that the next one is whole.
  if (!text.ends_with('\n')) append_text(path_, "\n");
}

std::map<std::size_t, Journal::Done> Journal::finished() const {
  const std::string text = read_text(path_);
  std::map<std::size_t, Done> jobs;
  std::string_view rest = text;
  for (std::size_t end = 0; (end = rest.find('\n')) != std::string_view::npos;
       rest.remove_prefix(end + 1)) {
    std::size_t job = 0;
    Done done{};
    if (!parse_line(rest.substr(0, end), job, done)) continue;
    const auto [at, is_first] = jobs.try_emplace(job, done);
    if (!is_first && at->second.source != done.source) {
      fail(ErrorCode::kInvalidArgument,
           "{}: holds an unfinished conversion of two sources at once; remove the directory",
           dir().string());
    }
    at->second = done;
  }
  return jobs;
}

void Journal::add(std::size_t job, Done done) const {
  append_text(path_, fmt::format("{} {:016x} {:016x}\n", job, done.bytes, done.source));
}

}  // namespace sluice
