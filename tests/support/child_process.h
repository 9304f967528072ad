// child_process.h - a process that a test starts, stops and ends.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <exception>
#include <stdexcept>

namespace sluice::testing {

/// Runs body() in a process of its own, which then ends as if killed: no destructor runs, nothing
/// is flushed. Make it before the test starts threads. The destructor kills and reaps it.
class ChildProcess {
 public:
  template <class Body>
  explicit ChildProcess(const Body& body) : pid_(fork()) {
    if (pid_ < 0) throw std::runtime_error("fork failed");
    if (pid_ > 0) return;
    try {
      body();
    } catch (...) {
      _exit(1);
    }
    _exit(0);
  }
  ~ChildProcess() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  /// `signal`: SIGSTOP, SIGKILL, ...
  void send(int signal) const { kill(pid_, signal); }

 private:
  pid_t pid_;
};

/// True if `body` is true in a child, which is ended after 20 s.
template <class Body>
[[nodiscard]] bool holds_in_child(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    bool is_true = false;
    try {
      is_true = body();
    } catch (...) {
    }
    _exit(is_true ? 0 : 1);
  }
  int status = -1;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace sluice::testing
