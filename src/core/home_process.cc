#include "core/home_process.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

/// What children do not keep. Never destroyed: a process may fork while it ends.
struct Kept {
  std::mutex mutex;  // Held over each fork(), by the thread that forks.
  std::vector<int> descriptors;
};
Kept& kept() {
  static auto* const all = new Kept;  // NOLINT(cppcoreguidelines-owning-memory)
  return *all;
}

/// In the child, where only what a signal handler may do is safe.
void let_go() noexcept {
  const int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
  if (nothing < 0) return;
  for (const int descriptor : kept().descriptors) (void)dup3(nothing, descriptor, O_CLOEXEC);
  (void)close(nothing);
}

}  // namespace

void HomeProcess::look_at_forks() {
  static const int status =
      pthread_atfork([] { kept().mutex.lock(); }, [] { kept().mutex.unlock(); },
                     [] {
                       num_forks.fetch_add(1);
                       let_go();
                       kept().mutex.unlock();
                     });
  if (status != 0) fail(ErrorCode::kOutOfMemory, "pthread_atfork: error {}", status);
}

HomeProcess::HomeProcess() {
  look_at_forks();
  num_forks_ = num_forks.load(std::memory_order_relaxed);
  process_ = getpid();
}

void HomeProcess::refuse(const char* what) const {
  fail(ErrorCode::kInvalidArgument,
       "{}: made in process {}, used in process {}, which was forked from it: fork() copies no "
       "threads and no connections; make another one here",
       what, process_, getpid());
}

NotInChildren::NotInChildren(std::vector<int> descriptors) : descriptors_(std::move(descriptors)) {
  HomeProcess::look_at_forks();
  std::erase(descriptors_, -1);
  const std::lock_guard lock(kept().mutex);
  kept().descriptors.insert(kept().descriptors.end(), descriptors_.begin(), descriptors_.end());
}

void NotInChildren::clear() noexcept {
  const std::lock_guard lock(kept().mutex);
  for (const int descriptor : descriptors_) {
    const auto found = std::ranges::find(kept().descriptors, descriptor);
    if (found != kept().descriptors.end()) kept().descriptors.erase(found);
  }
  descriptors_.clear();
}

}  // namespace sluice
