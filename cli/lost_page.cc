#include "lost_page.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

#include "sluice/checkpoint.h"
#include "sluice/error.h"

namespace sluice::cli {
namespace {

/// A line that is put together without memory from anywhere, for a signal handler.
class Line {
 public:
  Line& operator<<(std::string_view text) {
    const std::size_t count = std::min(text.size(), sizeof text_ - size_);
    std::memcpy(text_ + size_, text.data(), count);
    size_ += count;
    return *this;
  }
  Line& operator<<(std::uint64_t number) {
    char digits[20];
    const auto [end, problem] = std::to_chars(digits, digits + sizeof digits, number);
    return *this << std::string_view(digits, static_cast<std::size_t>(end - digits));
  }
  void print() const {
    std::size_t done = 0;
    while (done < size_) {
      const ssize_t count = write(STDERR_FILENO, text_ + done, size_ - done);
      if (count <= 0) return;
      done += static_cast<std::size_t>(count);
    }
  }

 private:
  char text_[5120];  // A path has at most 4096 bytes.
  std::size_t size_ = 0;
};

void on_bus_error(int, siginfo_t* info, void*) {
  static std::atomic_flag is_told;
  const std::optional<MappedState> file = find_mapped(info->si_addr);
  if (!file) {
    signal(SIGBUS, SIG_DFL);
    raise(SIGBUS);  // Held back until the handler returns.
    return;
  }
  if (is_told.test_and_set()) {
    for (;;) pause();  // Another thread is about to end the program.
  }
  const bool is_cut = file->bytes_now < file->bytes_mapped;
  const ErrorCode code = is_cut ? ErrorCode::kCorruptFile : ErrorCode::kIo;
  Line line;
  if (isatty(STDERR_FILENO) != 0) line << "\r\033[K";  // Instead of a progress line.
  line << "sluice: " << to_string(code) << ": " << file->path << ": ";
  if (is_cut) {
    line << file->bytes_now << " of its " << file->bytes_mapped
         << " bytes are left: it became shorter while it was read\n";
  } else {
    line
        << "a page of it cannot be read (SIGBUS): its disk failed, or it was shorter for a while\n";
  }
  line.print();
  _exit(exit_status(code));
}

}  // namespace

void explain_lost_pages() {
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  (void)sigaction(SIGBUS, &action, nullptr);
}

}  // namespace sluice::cli
