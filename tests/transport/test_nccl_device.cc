// Rails over NCCL itself and device memory: bytes, graphs, and a rank that does not come.
// `test_nccl_device --transport nccl --processes 4 --hosts 2`; skips itself elsewhere.
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "multirank/run_ranks.h"
#include "transport/nccl_api.h"
#include "transport/rails.h"

namespace sluice::testing {
namespace {

using Clock = std::chrono::steady_clock;

#define ASSERT_CUDA(call) ASSERT_EQ(call, cudaSuccess)

class NcclDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (num_devices(Device::Kind::kCuda) == 0) {
      std::printf("skipped: no CUDA device on this machine\n");
      GTEST_SKIP();
    }
    if (process_transport() != "nccl") GTEST_SKIP() << "for --transport nccl";
  }
};

/// Pieces in device memory for and from every host.
struct Pieces {
  Pieces(Rail& rail_in, std::size_t bytes_in) : rail(rail_in), bytes(bytes_in) {
    const auto all = bytes * static_cast<std::size_t>(rail.num_hosts());
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&out), all), cudaSuccess);
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&in), all), cudaSuccess);
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    for (int h = 0; h < rail.num_hosts(); ++h) {
      const auto at = static_cast<std::size_t>(h) * bytes;
      if (h == rail.host()) continue;
      sends.push_back({h, out + at, bytes});
      receives.push_back({h, in + at, bytes});
    }
  }
  ~Pieces() {
    (void)cudaStreamDestroy(stream);
    (void)cudaFree(out);
    (void)cudaFree(in);
  }
  /// Byte i of what host `from` sends to host `to` in a round.
  static unsigned char value(int round, int from, int to, std::size_t i) {
    return static_cast<unsigned char>(i * 7 + i / 251 + static_cast<std::size_t>(round) * 31 +
                                      static_cast<std::size_t>(from) * 101 +
                                      static_cast<std::size_t>(to) * 53);
  }
  void fill(int round) {
    std::vector<unsigned char> host(bytes * static_cast<std::size_t>(rail.num_hosts()));
    for (int h = 0; h < rail.num_hosts(); ++h) {
      for (std::size_t i = 0; i < bytes; ++i) {
        host[static_cast<std::size_t>(h) * bytes + i] = value(round, rail.host(), h, i);
      }
    }
    ASSERT_CUDA(cudaMemcpyAsync(out, host.data(), host.size(), cudaMemcpyHostToDevice, stream));
    ASSERT_CUDA(cudaMemsetAsync(in, 0xff, host.size(), stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
  }
  void expect(int round) {
    std::vector<unsigned char> host(bytes * static_cast<std::size_t>(rail.num_hosts()));
    ASSERT_CUDA(cudaMemcpyAsync(host.data(), in, host.size(), cudaMemcpyDeviceToHost, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    for (const Rail::Receive& r : receives) {
      for (std::size_t i = 0; i < bytes; ++i) {
        ASSERT_EQ(host[static_cast<std::size_t>(r.host) * bytes + i],
                  value(round, r.host, rail.host(), i))
            << "round " << round << " from host " << r.host << " byte " << i;
      }
    }
  }

  Rail& rail;
  std::size_t bytes;
  unsigned char *out = nullptr, *in = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<Rail::Send> sends;
  std::vector<Rail::Receive> receives;
};

int num_processes() {
  return control_transport()->num_ranks();
}

TEST_F(NcclDeviceTest, PiecesArriveEagerAndInGraphs) {
  run_ranks(num_processes(), [](Transport& transport) {
    auto& on_hosts = dynamic_cast<RailTransport&>(transport);
    ASSERT_NE(on_hosts.rail(), nullptr) << "all ranks are on one host";
    Rail& rail = *on_hosts.rail();
    EXPECT_EQ(transport.hosts().num_hosts(), rail.num_hosts());
    EXPECT_EQ(on_hosts.mates().num_ranks() * rail.num_hosts(), transport.num_ranks());
    ASSERT_CUDA(cudaSetDevice(transport.rank() % num_devices(Device::Kind::kCuda)));
    for (const std::size_t bytes : {std::size_t{16}, std::size_t{960'000}, std::size_t{8} << 20}) {
      Pieces pieces(rail, bytes);
      for (int round = 0; round < 5; ++round) {
        ASSERT_NO_FATAL_FAILURE(pieces.fill(round));
        rail.exchange(pieces.sends, pieces.receives, pieces.stream);
        ASSERT_NO_FATAL_FAILURE(pieces.expect(round));
      }
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t replay = nullptr;
      ASSERT_CUDA(cudaStreamBeginCapture(pieces.stream, cudaStreamCaptureModeThreadLocal));
      rail.exchange(pieces.sends, pieces.receives, pieces.stream);
      ASSERT_CUDA(cudaStreamEndCapture(pieces.stream, &graph));
      ASSERT_CUDA(cudaGraphInstantiate(&replay, graph, 0));
      for (int round = 5; round < 15; ++round) {
        ASSERT_NO_FATAL_FAILURE(pieces.fill(round));
        ASSERT_CUDA(cudaGraphLaunch(replay, pieces.stream));
        ASSERT_NO_FATAL_FAILURE(pieces.expect(round));
      }
      (void)transport.all_gather({}, kProcessTimeout);
      constexpr int kTimes = 10;
      const auto begin = Clock::now();
      for (int i = 0; i < kTimes; ++i) ASSERT_CUDA(cudaGraphLaunch(replay, pieces.stream));
      ASSERT_CUDA(cudaStreamSynchronize(pieces.stream));
      const double us = std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
      if (transport.rank() == 0) {
        std::printf("rail: %zu bytes to each host: %.1f us in a graph\n", bytes, us / kTimes);
      }
      (void)transport.all_gather({}, kProcessTimeout);
      ASSERT_CUDA(cudaGraphExecDestroy(replay));
      ASSERT_CUDA(cudaGraphDestroy(graph));
    }
    rail.check();
  });
}

// The device counts nothing here, so the words say that an operation has begun and never ends.
TEST_F(NcclDeviceTest, ARankThatDoesNotComeIsNamedAndTheStreamEnds) {
  constexpr std::chrono::milliseconds kTimeout{3'000};
  const auto ipc = make_process_transport("ipc", 0, kProcessTimeout);
  const auto transport = make_nccl_over(*ipc, kTimeout);
  Rail& rail = *dynamic_cast<RailTransport&>(*transport).rail();
  const int late = transport->num_ranks() - 1;
  ASSERT_CUDA(cudaSetDevice(transport->rank() % num_devices(Device::Kind::kCuda)));
  Pieces pieces(rail, 4096);
  ASSERT_NO_FATAL_FAILURE(pieces.fill(0));
  rail.exchange(pieces.sends, pieces.receives, pieces.stream);
  ASSERT_NO_FATAL_FAILURE(pieces.expect(0));
  (void)ipc->all_gather({}, kProcessTimeout);
  std::atomic<std::uint64_t> begun{0}, done{0};
  std::atomic<bool> failed{false};
  const int watch = rail.watch({&begun, &done}, [&](const Error&) { failed = true; });
  if (transport->rank() != late) {
    const auto begin = Clock::now();
    begun = 1;
    // Of a rank of another rail nothing is missing; its operation is complete, but counts as open.
    rail.exchange(pieces.sends, pieces.receives, pieces.stream);
    ASSERT_CUDA(cudaStreamSynchronize(pieces.stream));
    while (!failed && Clock::now() - begin < std::chrono::seconds(9)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    const auto took =
        std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - begin).count();
    std::printf("rank %d: the stream ended after %d ms\n", transport->rank(),
                static_cast<int>(took));
    EXPECT_LT(took, kTimeout.count() + 2'000);
    try {
      rail.check();
      ADD_FAILURE() << "nothing failed on rank " << transport->rank();
    } catch (const Error& error) {
      EXPECT_THAT(error.ranks(), ::testing::ElementsAre(late)) << error.what();
      EXPECT_THAT(error.what(), ::testing::HasSubstr("of host virtual-host-")) << error.what();
    }
  } else {
    std::this_thread::sleep_for(kTimeout + std::chrono::milliseconds(1'800));
  }
  (void)ipc->all_gather({}, kProcessTimeout);
  rail.stop_watching(watch);
}

/// A communicator of all processes, made as a program would make it. Null where two of them share a
/// host and a GPU, which NCCL takes for a mistake.
NcclComm make_communicator(const NcclApi& api, Transport& ipc, int num_hosts) {
  const int ranks = ipc.num_ranks(), devices = num_devices(Device::Kind::kCuda);
  if (ranks / num_hosts > devices) return nullptr;
  NcclId id{};
  const int made = ipc.rank() == 0 ? api.new_id(&id) : kNcclSuccess;
  EXPECT_EQ(made, kNcclSuccess);
  const auto ids = ipc.all_gather(id, kProcessTimeout);
  std::ranges::copy(ids[0], id.begin());
  NcclComm comm = nullptr;
  int status = api.init(&comm, ranks, id, ipc.rank(), ipc.rank() % devices);
  const auto deadline = Clock::now() + kProcessTimeout;
  while (status == kNcclInProgress && Clock::now() < deadline) {
    EXPECT_EQ(api.async_error(comm, &status), kNcclSuccess);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(status, kNcclSuccess) << api.error_string(status);
  return comm;
}

// An ncclComm_t that the program has is enough to make rails, and works on afterwards.
TEST_F(NcclDeviceTest, ACommunicatorOfTheCallerMakesATransport) {
  const NcclApi& api = nccl_library("");
  const auto ipc = make_process_transport("ipc", 0, kProcessTimeout);
  const auto first = make_nccl_over(*ipc, kProcessTimeout);
  const int num_hosts = first->hosts().num_hosts();
  const NcclComm comm = make_communicator(api, *ipc, num_hosts);
  if (comm == nullptr) {
    std::printf("skipped: ranks of a host share a GPU\n");
    GTEST_SKIP();
  }
  const int device = ipc->rank() % num_devices(Device::Kind::kCuda);
  const ProcessGroup group = group_of_communicator(comm, NcclConfig{}, kProcessTimeout);
  EXPECT_EQ(group.rank, ipc->rank());
  EXPECT_EQ(group.num_ranks, ipc->num_ranks());
  {
    const auto transport = make_nccl_transport({.device = device}, group, kProcessTimeout);
    EXPECT_TRUE(transport->hosts() == first->hosts());
    Rail& rail = *dynamic_cast<RailTransport&>(*transport).rail();
    Pieces pieces(rail, 4'096);
    ASSERT_NO_FATAL_FAILURE(pieces.fill(1));
    rail.exchange(pieces.sends, pieces.receives, pieces.stream);
    ASSERT_NO_FATAL_FAILURE(pieces.expect(1));
    (void)transport->all_gather({}, kProcessTimeout);
  }
  const auto byte = static_cast<std::byte>(ipc->rank());
  const auto all = group.all_gather({&byte, 1});
  for (std::size_t r = 0; r < all.size(); ++r) EXPECT_EQ(static_cast<std::size_t>(all[r][0]), r);
  (void)ipc->all_gather({}, kProcessTimeout);
  EXPECT_EQ(api.abort(comm), kNcclSuccess);
}

}  // namespace
}  // namespace sluice::testing
