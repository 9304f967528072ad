#include <fmt/core.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "sluice/error.h"
#include "sluice/lab/ranks.h"

namespace sluice {
namespace {

constexpr int kKilled = 4;

std::string random_token() {
  unsigned char bytes[16];
  if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) {
    throw Error(ErrorCode::kIo, fmt::format("getrandom: {}", std::strerror(errno)));
  }
  std::string text;
  for (const unsigned char byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

/// The words that this program was called with.
std::vector<std::string> own_arguments() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  if (words.empty()) throw Error(ErrorCode::kIo, "cannot read /proc/self/cmdline");
  return words;
}

pid_t start(const std::vector<std::string>& words, pid_t parent) {
  std::vector<char*> argv;
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const pid_t pid = fork();
  if (pid < 0) throw Error(ErrorCode::kIo, fmt::format("fork: {}", std::strerror(errno)));
  if (pid > 0) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(kKilled);  // It ended before the line above.
  execv("/proc/self/exe", argv.data());
  _exit(127);
}

/// The processes of the job; none is left when it goes.
class Children {
 public:
  ~Children() {
    for (std::size_t r = 0; r < pids_.size(); ++r) {
      if (status_[r] >= 0) continue;
      kill(pids_[r], SIGKILL);
      int status = 0;
      waitpid(pids_[r], &status, 0);
    }
  }
  void add(pid_t pid) { pids_.push_back(pid), status_.push_back(-1); }

  /// Takes note of who has ended; true while somebody runs.
  bool look(const std::function<void(int rank, int signal)>& on_signal) {
    bool running = false;
    for (std::size_t r = 0; r < pids_.size(); ++r) {
      if (status_[r] >= 0) continue;
      int status = 0;
      if (waitpid(pids_[r], &status, WNOHANG) == pids_[r]) {
        status_[r] = WIFEXITED(status) ? WEXITSTATUS(status) : kKilled;
        if (WIFSIGNALED(status) && !ends_them_ && on_signal) {
          on_signal(static_cast<int>(r), WTERMSIG(status));
        }
      } else {
        running = true;
      }
    }
    return running;
  }
  void kill_rest() {
    ends_them_ = true;
    for (std::size_t r = 0; r < pids_.size(); ++r) {
      if (status_[r] < 0) kill(pids_[r], SIGKILL);
    }
  }
  [[nodiscard]] int worst() const {
    for (const int status : status_) {
      if (status > 0) return status;
    }
    return 0;
  }

 private:
  std::vector<pid_t> pids_;
  std::vector<int> status_;
  bool ends_them_ = false;
};

}  // namespace

int run_as_processes(int num_ranks, std::chrono::milliseconds patience,
                     const std::function<void(int rank, int signal)>& on_signal) {
  const std::vector<std::string> words = own_arguments();
  setenv("SLUICE_WORLD_SIZE", std::to_string(num_ranks).c_str(), 1);
  setenv("SLUICE_JOB", random_token().c_str(), 1);
  setenv("SLUICE_SECRET", random_token().c_str(), 1);
  Children children;
  const pid_t parent = getpid();
  for (int r = 0; r < num_ranks; ++r) {
    setenv("SLUICE_RANK", std::to_string(r).c_str(), 1);
    children.add(start(words, parent));
  }
  using Clock = std::chrono::steady_clock;
  auto deadline = Clock::time_point::max();
  while (children.look(on_signal)) {
    if (children.worst() != 0 && deadline == Clock::time_point::max()) {
      deadline = Clock::now() + patience;
    }
    if (Clock::now() >= deadline) children.kill_rest();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return children.worst();
}

}  // namespace sluice
