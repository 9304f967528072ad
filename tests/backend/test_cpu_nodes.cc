// Machines with several nodes of memory, from made-up folders: which thread belongs where, what
// each node computes, and that no bit depends on it.
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/memory_nodes.h"
#include "backend/cpu/page_buffer.h"
#include "backend/cpu/prepared_experts.h"
#include "backend/cpu/task_queue.h"
#include "backend/cpu/wave_progress.h"
#include "core/threads.h"
#include "expert_fixture.h"

namespace sluice::testing {
namespace {

/// A folder as /sys/devices/system/node; gone with this object.
class FakeNodes {
 public:
  explicit FakeNodes(const std::vector<std::pair<int, std::string>>& cores_of_nodes)
      : root_(std::filesystem::temp_directory_path() /
              ("sluice_nodes_" + std::to_string(getpid()) + "_" + std::to_string(next_++))) {
    std::filesystem::create_directories(root_ / "power");  // A folder of another kind.
    std::ofstream(root_ / "online") << "0\n";
    for (const auto& [node, cores] : cores_of_nodes) {
      const auto folder = root_ / ("node" + std::to_string(node));
      std::filesystem::create_directories(folder);
      std::ofstream(folder / "cpulist") << cores << '\n';
    }
  }
  FakeNodes(const FakeNodes&) = delete;
  FakeNodes& operator=(const FakeNodes&) = delete;
  ~FakeNodes() { std::filesystem::remove_all(root_); }
  [[nodiscard]] const std::filesystem::path& root() const { return root_; }

 private:
  static inline int next_ = 0;
  std::filesystem::path root_;
};

std::vector<int> nodes_of_threads(const cpu::MemoryNodes& nodes, int num_threads) {
  std::vector<int> out;
  for (int t = 0; t < num_threads; ++t) out.push_back(nodes.of_thread(t));
  return out;
}

/// item * 10 + slice, in the order in which a thread that is alone takes them.
std::vector<std::int64_t> tasks_of_one_thread(const cpu::MemoryNodes& nodes, std::int64_t items,
                                              std::int64_t slices, int thread) {
  cpu::TaskQueue queue(nodes, items, slices);
  std::vector<std::int64_t> out;
  while (const auto task = queue.take(thread)) out.push_back(task->item * 10 + task->slice);
  return out;
}

TEST(CpuNodes, ThreadsBelongToTheNodesOfTheirCores) {
  const FakeNodes two({{0, "0-1,4"}, {3, "2-3,5"}, {7, ""}});  // Node 7 is memory alone.
  const cpu::MemoryNodes all({0, 1, 2, 3, 4, 5}, 6, two.root());
  EXPECT_EQ(all.count(), 2);
  EXPECT_EQ(nodes_of_threads(all, 6), (std::vector<int>{0, 0, 1, 1, 0, 1}));
  const cpu::MemoryNodes uneven({1, 2, 3}, 3, two.root());
  EXPECT_EQ(nodes_of_threads(uneven, 3), (std::vector<int>{0, 1, 1}));
  EXPECT_EQ(uneven.share(0, 16).first, 0);
  EXPECT_EQ(uneven.share(0, 16).last, 5);
  EXPECT_EQ(uneven.share(1, 16).first, 5);
  EXPECT_EQ(uneven.share(1, 16).last, 16);
  const cpu::MemoryNodes more_threads({0, 2}, 5, two.root());
  EXPECT_EQ(nodes_of_threads(more_threads, 5), (std::vector<int>{0, 1, 0, 1, 0}));
  const cpu::MemoryNodes one_of_two({2, 3}, 2, two.root());
  EXPECT_EQ(one_of_two.count(), 1);
}

TEST(CpuNodes, WhatCannotBeReadIsOneNode) {
  for (const char* const cores : {"", "x", "3-", "-1", "5-2", "0,,1"}) {
    const FakeNodes odd({{0, "0-1"}, {1, cores}});
    EXPECT_EQ(cpu::MemoryNodes({0, 1}, 2, odd.root()).count(), 1) << cores;
  }
  EXPECT_EQ(cpu::MemoryNodes({0, 1}, 2, "/no/such/folder").count(), 1);
  EXPECT_EQ(cpu::MemoryNodes({0, 1}, 2, FakeNodes({{0, "0-1"}}).root()).count(), 1);
}

TEST(CpuNodes, EveryTaskIsDoneOnce) {
  const FakeNodes three({{0, "0"}, {1, "1"}, {2, "2-3"}});
  for (const int num_threads : {1, 2, 3, 4, 7}) {
    const cpu::MemoryNodes nodes({0, 1, 2, 3}, num_threads, three.root());
    ThreadPool pool(num_threads, available_cores());
    for (const std::int64_t slices : {1, 2, 3, 16}) {
      constexpr std::int64_t kItems = 5;
      std::vector<std::atomic<int>> done(static_cast<std::size_t>(kItems * slices));
      cpu::TaskQueue queue(nodes, kItems, slices);
      pool.run([&](int thread) {
        while (const auto task = queue.take(thread)) {
          ++done[static_cast<std::size_t>(task->item * slices + task->slice)];
        }
      });
      for (const std::atomic<int>& count : done) EXPECT_EQ(count, 1);
    }
  }
}

TEST(CpuNodes, OneThreadTakesItsNodeFirst) {
  const FakeNodes two({{0, "0"}, {1, "1"}});
  const cpu::MemoryNodes nodes({1, 0}, 2, two.root());  // Thread 0 is on node 1.
  ASSERT_EQ(nodes.of_thread(0), 1);
  EXPECT_EQ(tasks_of_one_thread(nodes, 2, 4, 0),  // The other thread never comes.
            (std::vector<std::int64_t>{2, 3, 12, 13, 0, 1, 10, 11}));
}

/// Its own run, then the others' from the next thread on, those of its node first.
TEST(CpuNodes, AThreadTakesItsOwnRunFirst) {
  EXPECT_EQ(tasks_of_one_thread(cpu::MemoryNodes(3), 3, 2, 1),
            (std::vector<std::int64_t>{10, 11, 20, 21, 0, 1}));
  EXPECT_EQ(tasks_of_one_thread(cpu::MemoryNodes(2), 3, 1, 0),
            (std::vector<std::int64_t>{0, 10, 20}));
  const FakeNodes two({{0, "0-1"}, {1, "2-3"}});
  const cpu::MemoryNodes nodes({0, 2, 1, 3}, 4, two.root());  // On nodes 0, 1, 0, 1.
  EXPECT_EQ(tasks_of_one_thread(nodes, 2, 4, 2),
            (std::vector<std::int64_t>{10, 11, 0, 1, 12, 13, 2, 3}));
}

/// A thread that waits for digits goes on when they are there, or when they never will be.
TEST(CpuNodes, AThreadWaitsForDigits) {
  for (const bool fails : {false, true}) {
    cpu::WaveProgress progress(2, 2, 1);
    std::atomic<int> waited{0};
    std::vector<std::thread> threads;
    for (const int what : {0, 1, 2}) {
      threads.emplace_back([&, what] {
        const bool is_there = what == 0   ? progress.wait_for_x(0)
                              : what == 1 ? progress.wait_for_h(1)
                                          : progress.wait_for_all_x();
        EXPECT_EQ(is_there, !fails);
        ++waited;
      });
    }
    progress.report_x(0), progress.report_x(1), progress.report_x(1), progress.report_h(0);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(waited, 0);
    if (fails) {
      progress.report_failure();
    } else {
      progress.report_x(0), progress.report_h(1);
    }
    for (std::thread& thread : threads) thread.join();
  }
}

/// Whatever the system says to nodes that this machine may not have, memory is memory.
TEST(CpuNodes, PlacedMemoryCanBeWritten) {
  const FakeNodes two({{0, "0"}, {1, "1"}});
  const cpu::MemoryNodes nodes({0, 1}, 2, two.root());
  for (const std::size_t bytes : {std::size_t{128}, std::size_t{5} << 20}) {
    cpu::PageBuffer buffer(bytes);
    nodes.place(buffer.data(), bytes, 8);
    std::memset(buffer.data(), 7, bytes);
    EXPECT_EQ(buffer.data()[bytes - 1], std::byte{7});
  }
}

#if defined(SYS_get_mempolicy)
/// The node that a page is asked of; -1: any. None: this system cannot tell.
std::optional<int> preferred_node(std::byte* page) {
  constexpr unsigned long kOfAddress = 2;  // MPOL_F_ADDR
  constexpr int kPreferred = 1, kMaxNodes = 1024;
  unsigned long mask[kMaxNodes / 64] = {};
  int mode = 0;
  if (syscall(SYS_get_mempolicy, &mode, mask, kMaxNodes, page, kOfAddress) != 0) return {};
  if (mode != kPreferred) return -1;
  for (int node = 0; node < kMaxNodes; ++node) {
    if ((mask[node / 64] >> (node % 64) & 1) != 0) return node;
  }
  return -1;
}

/// Where a page lies that was written to.
int node_of_page(std::byte* page) {
  void* pages[] = {page};
  int node = -1;
  return syscall(SYS_move_pages, 0, 1ul, pages, nullptr, &node, 0) == 0 ? node : -1;
}

/// What the system was really told, read back from it: of a buffer's pages, and of the codes of a
/// matrix, and where the pages then lie. A node that the machine lacks is refused by the system.
TEST(CpuNodes, TheSystemIsAskedForEachSharesNode) {
  const bool has_node_1 = std::filesystem::exists("/sys/devices/system/node/node1");
  const int second = has_node_1 ? 1 : -1;
  const FakeNodes two({{0, "0"}, {1, "1"}});
  const cpu::MemoryNodes nodes({0, 1, 0, 0}, 4, two.root());  // Node 0 has three threads of four.
  constexpr std::size_t kPages = 16;
  cpu::PageBuffer buffer(kPages * cpu::kPageBytes);
  if (!preferred_node(buffer.data())) GTEST_SKIP() << "this system has no policies of memory";
  nodes.place(buffer.data(), buffer.bytes(), 8);
  for (std::size_t page = 0; page < kPages; ++page) {
    std::byte* const at = buffer.data() + page * cpu::kPageBytes;
    EXPECT_EQ(preferred_node(at), page < 12 ? 0 : second);
    *at = std::byte{1};
    EXPECT_EQ(node_of_page(at), page >= 12 && has_node_1 ? 1 : 0);
  }
  StageCase c;
  c.geometry.hidden = 512, c.geometry.intermediate = 512;
  const cpu::PreparedCpuExperts experts(random_experts(c.geometry, c.scale_dtype, c.seed), nodes);
  const cpu::PreparedExpert& e = experts.expert(0);
  for (const cpu::PreparedMatrix* m : {&e.gate, &e.up, &e.down}) {
    auto* const codes = reinterpret_cast<std::byte*>(const_cast<std::uint8_t*>(m->codes));
    const auto bytes = static_cast<std::size_t>(m->code_bytes());
    EXPECT_EQ(preferred_node(codes), 0);
    EXPECT_EQ(preferred_node(codes + bytes * 3 / 4 - 1), 0);
    EXPECT_EQ(preferred_node(codes + bytes * 3 / 4), second);
    EXPECT_EQ(preferred_node(codes + bytes - 1), second);
  }
}

/// The experts of a backend on this machine's own nodes: each share lies where its threads run.
/// scripts/test_numa.sh makes a machine with two.
TEST(CpuNodes, CodesLieOnTheNodesOfThisMachine) {
  const std::filesystem::path root = "/sys/devices/system/node";
  const std::vector<int> cores = available_cores();
  const auto num_threads = static_cast<int>(cores.size());
  const cpu::MemoryNodes nodes(cores, num_threads, root);
  StageCase c;
  c.geometry.hidden = 1024, c.geometry.intermediate = 1024;
  cpu::CpuBackend device(num_threads, cores, root);
  const auto prepared = device.prepare(random_experts(c.geometry, c.scale_dtype, c.seed));
  const auto& expert = static_cast<const cpu::PreparedCpuExperts&>(*prepared).expert(0);
  for (int thread = 0; thread < num_threads; ++thread) {
    const std::string core = "cpu" + std::to_string(cores[static_cast<std::size_t>(thread)]);
    int id = 0;
    while (id < 1024 && !std::filesystem::exists(root / ("node" + std::to_string(id)) / core)) ++id;
    if (id == 1024) GTEST_SKIP() << "this system does not say which node " << core << " is on";
    for (const cpu::PreparedMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
      const auto share = nodes.share(nodes.of_thread(thread), m->n / 128);
      auto* const codes = reinterpret_cast<std::byte*>(const_cast<std::uint8_t*>(m->codes));
      const std::int64_t slice = m->code_bytes() / (m->n / 128);
      if (share.first == share.last) continue;
      EXPECT_EQ(node_of_page(codes + share.first * slice), id) << core;
      EXPECT_EQ(node_of_page(codes + share.last * slice - 1), id) << core;
    }
  }
}
#endif

/// With few tasks for many threads, each of which waits for digits that others make, and with more
/// rows than are held at once.
TEST(CpuNodes, TheStageGivesTheSameBits) {
  const FakeNodes two({{0, "0"}, {1, "1"}});
  StageCase c;
  c.geometry.num_experts = 4;
  c.geometry.hidden = 384, c.geometry.intermediate = 256;
  for (const std::int32_t most : {70, 2050}) {
    c.rows = {5, 0, most, 1};
    const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, c.seed);
    const auto run = [&](int num_threads, const std::filesystem::path& root) {
      cpu::CpuBackend device(num_threads, {0, 1}, root);
      const auto prepared = device.prepare(weights);
      std::vector<std::uint16_t> out;
      for (int call = 0; call < (most == 70 ? 5 : 1); ++call) {
        StageBuffers b(c);
        device.expert_stage(*prepared, b.in(), b.rows(), b.h(), b.out.data(), {}, nullptr);
        EXPECT_TRUE(out.empty() || out == b.out);
        out = b.out;
      }
      return out;
    };
    const std::vector<std::uint16_t> expected = run(1, "/no/such/folder");
    for (const int num_threads : {2, 3, 8}) {
      if (most > 70 && num_threads != 3) continue;
      EXPECT_TRUE(run(num_threads, two.root()) == expected) << num_threads;
      EXPECT_TRUE(run(num_threads, "/no/such/folder") == expected) << num_threads;
    }
  }
}

}  // namespace
}  // namespace sluice::testing
