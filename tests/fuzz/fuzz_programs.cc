// Runs a fuzz target on random programs in several processes: what libFuzzer's main does, for
// compilers that have none. No coverage guides it; the target's edits know the structure.
//
//   fuzz_config_programs -runs=10000000 -seed=1 -jobs=16 [-first=I] [-timeout=SECONDS]
//
// Process j runs programs first + j, first + j + jobs, ... of the seed. The run fails, and names
// the program that was being run, when a process crashes, takes longer than the timeout for one
// program, or holds more memory at its end than after its first thousand programs. Under
// AddressSanitizer the sanitizer looks for leaks instead.
#include <malloc.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "config_meaning.h"
#include "random_program.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace sluice::fuzz {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::uint64_t runs = 10'000, seed = 1, jobs = 1, first = 0, timeout = 10;
};

/// What a process tells its parent, in shared memory.
struct Progress {
  std::atomic<std::uint64_t> current = 0;  ///< The program being run.
  std::atomic<std::uint64_t> done = 0, accepted = 0, refused = 0;
};

Options parse(int argc, char** argv) {
  Options options;
  const struct {
    std::string_view name;
    std::uint64_t& value;
  } known[] = {{"-runs=", options.runs},
               {"-seed=", options.seed},
               {"-jobs=", options.jobs},
               {"-first=", options.first},
               {"-timeout=", options.timeout}};
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto* const at = std::ranges::find_if(
        known, [&](const auto& option) { return argument.starts_with(option.name); });
    const std::string_view text =
        at == std::end(known) ? std::string_view() : argument.substr(at->name.size());
    std::uint64_t value = 0;
    const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || problem != std::errc() || end != text.data() + text.size()) {
      std::fprintf(stderr, "%s: not -runs=, -seed=, -jobs=, -first= or -timeout= and a number\n",
                   argv[i]);
      std::exit(2);
    }
    at->value = value;
  }
  options.jobs = std::clamp<std::uint64_t>(options.jobs, 1, 1024);
  return options;
}

/// 0 where a sanitizer has its own allocator.
std::size_t bytes_in_use() {
  return mallinfo2().uordblks;
}

/// Returns the exit status of a process that ran all its programs.
int run_job(const Options& options, std::uint64_t job, Progress& progress) {
  constexpr std::uint64_t kWarmUp = 1000;  // Tables and buffers that are made once exist by then.
  constexpr std::size_t kLeakBytes = 1 << 16;  // Far below a byte per program of a long run.
  std::size_t before = 0;
  for (std::uint64_t i = job; i < options.runs; i += options.jobs) {
    progress.current = options.first + i;
    {
      // Of exact size, so that a sanitizer sees the first byte read past the end.
      const std::vector<std::uint8_t> made = random_program(options.seed, progress.current);
      const auto program = std::make_unique<std::uint8_t[]>(made.size());
      std::ranges::copy(made, program.get());
      if (LLVMFuzzerTestOneInput(program.get(), made.size()) != 0) std::abort();
    }
    if (++progress.done == kWarmUp) before = bytes_in_use();
  }
  progress.accepted = tally().accepted;
  progress.refused = tally().refused;
  if (before == 0 || bytes_in_use() <= before + kLeakBytes) return 0;
  std::fprintf(stderr, "process %llu holds %zu bytes more than after %llu programs\n",
               static_cast<unsigned long long>(job), bytes_in_use() - before,
               static_cast<unsigned long long>(kWarmUp));
  return 1;
}

/// Waits for a process. Ends it if one program takes longer than the timeout.
bool job_succeeds(const Options& options, pid_t pid, const Progress& progress) {
  std::uint64_t seen = progress.done;
  Clock::time_point since = Clock::now();
  for (;; std::this_thread::sleep_for(std::chrono::milliseconds(20))) {
    int status = 0;
    if (::waitpid(pid, &status, WNOHANG) == pid) {
      if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
      std::fprintf(stderr, "%s %d\n", WIFSIGNALED(status) ? "signal" : "exit status",
                   WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
      return false;
    }
    if (const std::uint64_t done = progress.done; done != seen) {
      seen = done, since = Clock::now();
    } else if (Clock::now() - since > std::chrono::seconds(options.timeout)) {
      ::kill(pid, SIGABRT);
      ::waitpid(pid, &status, 0);
      std::fprintf(stderr, "no end after %llu s\n",
                   static_cast<unsigned long long>(options.timeout));
      return false;
    }
  }
}

Progress* make_progress(std::uint64_t jobs) {
  void* const memory = ::mmap(nullptr, jobs * sizeof(Progress), PROT_READ | PROT_WRITE,
                              MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  return std::uninitialized_default_construct_n(static_cast<Progress*>(memory), jobs) - jobs;
}

int run(const Options& options, const char* self) {
  Progress* const progress = make_progress(options.jobs);
  const Clock::time_point begin = Clock::now();
  std::vector<pid_t> pids;
  for (std::uint64_t job = 0; job < options.jobs; ++job) {
    const pid_t pid = ::fork();
    if (pid < 0) {
      std::perror("fork");
      return 2;
    }
    // exit() lets a sanitizer look for leaks.
    if (pid == 0) std::exit(run_job(options, job, progress[job]));
    pids.push_back(pid);
  }
  std::vector<char> succeeded(pids.size());
  std::vector<std::thread> watchers;
  for (std::size_t job = 0; job < pids.size(); ++job) {
    watchers.emplace_back(
        [&, job] { succeeded[job] = job_succeeds(options, pids[job], progress[job]); });
  }
  for (std::thread& watcher : watchers) watcher.join();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  std::uint64_t done = 0, accepted = 0, refused = 0;
  for (std::size_t job = 0; job < pids.size(); ++job) {
    done += progress[job].done;
    accepted += progress[job].accepted;
    refused += progress[job].refused;
    if (succeeded[job]) continue;
    std::fprintf(stderr, "FAILED: %s -seed=%llu -runs=1 -first=%llu\n", self,
                 static_cast<unsigned long long>(options.seed),
                 static_cast<unsigned long long>(progress[job].current.load()));
  }
  const bool is_whole = std::ranges::all_of(succeeded, [](char ok) { return ok != 0; });
  std::printf(
      "%llu executions of seed %llu in %llu processes, %.1f s, %.0f per second: %llu "
      "accepted, %llu refused: %s\n",
      static_cast<unsigned long long>(done), static_cast<unsigned long long>(options.seed),
      static_cast<unsigned long long>(options.jobs), seconds, static_cast<double>(done) / seconds,
      static_cast<unsigned long long>(accepted), static_cast<unsigned long long>(refused),
      is_whole ? "nothing found" : "FAILED");
  return is_whole && done == options.runs ? 0 : 1;
}

}  // namespace
}  // namespace sluice::fuzz

int main(int argc, char** argv) {
  return sluice::fuzz::run(sluice::fuzz::parse(argc, argv), argv[0]);
}
