// What a process made before fork(), in the child, which has the memory and none of the threads.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "core/home_process.h"
#include "core/threads.h"
#include "sluice/error.h"
#include "support/child_process.h"

namespace sluice {
namespace {

using testing::holds_in_child;

std::string refusal_of(ThreadPool& pool) {
  try {
    pool.run([](int) {});
  } catch (const Error& error) {
    return error.code() == ErrorCode::kInvalidArgument ? error.what() : "another code";
  }
  return "";
}

TEST(Fork, AnInheritedPoolIsRefusedByName) {
  ThreadPool pool(3, available_cores());
  pool.run([](int) {});
  const std::string home = "made in process " + std::to_string(getpid());
  EXPECT_TRUE(holds_in_child([&] {
    const std::string text = refusal_of(pool);
    return text.find(home) != std::string::npos &&
           text.find("used in process " + std::to_string(getpid())) != std::string::npos;
  }));
  EXPECT_EQ(refusal_of(pool), "");  // The parent's goes on.
}

TEST(Fork, DestroyingAnInheritedPoolReturns) {
  // Asleep: destroying what a thread sleeps on would wait for it.
  auto pool = std::make_unique<ThreadPool>(3, available_cores());
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_TRUE(holds_in_child([&] {
    pool.reset();
    return true;
  }));
}

TEST(Fork, APoolWithoutWorkersGoesOn) {
  ThreadPool pool(1, available_cores());
  EXPECT_TRUE(holds_in_child([&] { return refusal_of(pool).empty(); }));
}

TEST(Fork, APoolOfTheChildWorksAndIsStrangeToItsChild) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer knows no threads of the child of a process with threads";
#endif
  const ThreadPool parents(2, available_cores());
  EXPECT_TRUE(holds_in_child([&] {
    ThreadPool own(3, available_cores());
    std::atomic<int> calls{0};
    own.run([&](int) { ++calls; });
    return calls == 3 && holds_in_child([&] { return !refusal_of(own).empty(); });
  }));
}

}  // namespace
}  // namespace sluice
