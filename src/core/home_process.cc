#include "core/home_process.h"

#include <pthread.h>
#include <unistd.h>

#include "core/fail.h"

namespace sluice {

HomeProcess::HomeProcess() {
  static const int status = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
  if (status != 0) fail(ErrorCode::kOutOfMemory, "pthread_atfork: error {}", status);
  num_forks_ = num_forks.load(std::memory_order_relaxed);
  process_ = getpid();
}

void HomeProcess::refuse(const char* what) const {
  fail(ErrorCode::kInvalidArgument,
       "{}: made in process {}, used in process {}, which was forked from it: fork() copies no "
       "threads and no connections; make another one here",
       what, process_, getpid());
}

}  // namespace sluice
