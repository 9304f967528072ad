// home_process.h - the process in which an object was made.
//
// fork() copies a process's memory into a child, and only the thread that called it. What has
// threads, locks that they hold, or a connection to other ranks is of no use in the child: there it
// is refused by name, and its destruction touches nothing.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace sluice {

class HomeProcess {
 public:
  /// The calling process.
  HomeProcess();

  /// Cost: a load. False in every child of the process, and in theirs.
  [[nodiscard]] bool is_here() const noexcept {
    return num_forks_ == num_forks.load(std::memory_order_relaxed);
  }
  /// Throws: kInvalidArgument with both processes, elsewhere than at home. `what`: for the message.
  void require(const char* what) const {
    if (!is_here()) refuse(what);
  }

 private:
  friend class NotInChildren;
  static void look_at_forks();
  [[noreturn]] void refuse(const char* what) const;

  /// How often this process's ancestors have forked on the way to it.
  static inline std::atomic<std::uint64_t> num_forks{0};

  std::uint64_t num_forks_;
  pid_t process_;
};

/// Descriptors whose end tells other processes that this one has ended. While it lives, every child
/// has /dev/null in their place, so that its copies do not hold that news back.
class NotInChildren {
 public:
  explicit NotInChildren(std::vector<int> descriptors);
  ~NotInChildren() { clear(); }
  NotInChildren(const NotInChildren&) = delete;
  NotInChildren& operator=(const NotInChildren&) = delete;
  void clear() noexcept;  ///< Before they are closed.

 private:
  std::vector<int> descriptors_;
};

/// A deleter that leaves the memory alone in a child: threads may have held its locks, or have
/// slept on them, and destroying a condition variable waits for its sleepers.
template <class T>
class DeletedAtHome {
 public:
  void operator()(T* object) const noexcept {
    if (home_.is_here()) delete object;  // NOLINT(cppcoreguidelines-owning-memory)
  }
  [[nodiscard]] const HomeProcess& home() const noexcept { return home_; }

 private:
  HomeProcess home_;
};

}  // namespace sluice
