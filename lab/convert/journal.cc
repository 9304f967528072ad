#include "convert/journal.h"

#include <charconv>
#include <string>
#include <string_view>

#include "core/fail.h"
#include "core/mmap.h"
#include "files/file_write.h"

namespace sluice {
namespace {

std::string head_line(std::uint64_t conversion) {
  return fmt::format("sluice-convert 1 {:016x}\n", conversion);
}

std::string read_all(const std::filesystem::path& path) {
  const auto file = MappedFile::open(path);
  return {reinterpret_cast<const char*>(file->bytes().data()), file->bytes().size()};
}

/// "<job> <16 hexadecimal digits>"; false for anything else.
bool parse_line(std::string_view line, std::size_t& job, std::uint64_t& digest) {
  const char* const end = line.data() + line.size();
  const auto [after, problem] = std::from_chars(line.data(), end, job);
  if (problem != std::errc{} || end - after != 17 || *after != ' ') return false;
  const auto [last, hex_problem] = std::from_chars(after + 1, end, digest, 16);
  return hex_problem == std::errc{} && last == end;
}

}  // namespace

Journal::Journal(const std::filesystem::path& dir, std::uint64_t conversion)
    : path_(dir / kFileName) {
  const std::string head = head_line(conversion);
  if (!std::filesystem::exists(path_)) write_new_text(path_, head);
  const std::string text = read_all(path_);
  if (!text.starts_with(head)) {
    fail(ErrorCode::kInvalidArgument,
         "{}: holds an unfinished conversion of another source or with other options; finish it as "
         "it was begun, or remove the directory",
         dir.string());
  }
  // After a line that was cut short, so that the next one is whole.
  if (!text.ends_with('\n')) append_text(path_, "\n");
}

std::map<std::size_t, std::uint64_t> Journal::finished() const {
  const std::string text = read_all(path_);
  std::map<std::size_t, std::uint64_t> jobs;
  std::string_view rest = text;
  for (std::size_t end = 0; (end = rest.find('\n')) != std::string_view::npos;
       rest.remove_prefix(end + 1)) {
    std::size_t job = 0;
    std::uint64_t digest = 0;
    if (parse_line(rest.substr(0, end), job, digest)) jobs[job] = digest;
  }
  return jobs;
}

void Journal::add(std::size_t job, std::uint64_t digest) const {
  append_text(path_, fmt::format("{} {:016x}\n", job, digest));
}

}  // namespace sluice
