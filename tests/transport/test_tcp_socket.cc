// Where rank 0 listens, and what becomes of a name that stands for several addresses.
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <array>
#include <chrono>
#include <string>
#include <vector>

#include "tcp_ranks.h"
#include "transport/tcp_socket.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

TcpEndpoint loopback(int port) {
  TcpEndpoint endpoint{.size = sizeof(sockaddr_in)};
  auto& four = reinterpret_cast<sockaddr_in&>(endpoint.address);
  four.sin_family = AF_INET, four.sin_port = htons(static_cast<std::uint16_t>(port));
  four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return endpoint;
}

// As addresses of IPv6 are to a system that is without it.
TEST(TcpSocket, AKindOfAddressThatTheSystemDoesNotHaveIsPassedOver) {
  const FileDescriptor listener = listen_over_tcp("127.0.0.1:0", Clock::now() + 5s);
  TcpEndpoint unknown = loopback(port_of_listener(listener.get()));
  unknown.address.ss_family = AF_MAX;
  const std::array both = {unknown, loopback(port_of_listener(listener.get()))};
  const Connected connected = connect_to_any(both, Clock::now() + 5s);
  EXPECT_TRUE(connected.socket) << connected.reason;
  const Connected none = connect_to_any({&unknown, 1}, Clock::now() + 5s);
  EXPECT_FALSE(none.socket);
  EXPECT_EQ(none.reason, "Address family not supported by protocol");
}

TEST(TcpSocket, AnAddressThatSwallowsPacketsLeavesTimeForTheOthers) {
  // Nobody accepts at it, and its queue is full: what else comes is dropped.
  const FileDescriptor full = listen_over_tcp("127.0.0.1:0", Clock::now() + 5s);
  ASSERT_EQ(listen(full.get(), 0), 0);
  const TcpEndpoint hole = loopback(port_of_listener(full.get()));
  std::vector<Connected> queue;
  do {
    ASSERT_LT(queue.size(), 8u);
    queue.push_back(connect_to_any({&hole, 1}, Clock::now() + 200ms));
  } while (queue.back().socket);
  const FileDescriptor listener = listen_over_tcp("127.0.0.1:0", Clock::now() + 5s);
  const std::array good = {hole, loopback(port_of_listener(listener.get()))};
  const Connected connected = connect_to_any(good, Clock::now() + 2s);
  EXPECT_TRUE(connected.socket) << connected.reason;
  const std::array bad = {hole, loopback(1), hole};
  EXPECT_EQ(connect_to_any(bad, Clock::now() + 300ms).reason,
            "127.0.0.1 Connection timed out, 127.0.0.1 Connection refused, "
            "127.0.0.1 Connection timed out");
}

// A host's own name is often an address of loopback to the host itself.
TEST(TcpSocket, RankZeroListensEverywhereForAName) {
  TcpJob job(2);
  const std::string port = job.address.substr(job.address.find(':'));
  TcpConfig zero = job.config(0);
  zero.addresses = {"this-host.invalid" + port};
  job.address = "127.0.0.77" + port;
  auto first = start_rank(zero, 5s), second = start_rank(job.config(1), 5s);
  EXPECT_EQ(first.get().text + second.get().text, "");
}

TEST(TcpSocket, ForAnAddressAndForLocalhostRankZeroListensThereAlone) {
  for (const std::string host : {"127.0.0.1", "localhost"}) {
    const FileDescriptor listener = listen_over_tcp(host + ":0", Clock::now() + 5s);
    const std::string port = std::to_string(port_of_listener(listener.get()));
    EXPECT_TRUE(connect_over_tcp(host + ":" + port, Clock::now() + 5s).socket) << host;
    EXPECT_EQ(connect_over_tcp("127.0.0.77:" + port, Clock::now() + 5s).reason,
              "Connection refused");
  }
}

TEST(TcpSocket, ANameWhosePortIsTakenIsNamed) {
  const FileDescriptor taken = listen_everywhere(0);
  const std::string port = std::to_string(port_of_listener(taken.get()));
  try {
    (void)listen_over_tcp("this-host.invalid:" + port, Clock::now() + 5s);
    FAIL() << "two listen at port " << port;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kTransport);
    EXPECT_THAT(error.what(),
                HasSubstr("listening at this-host.invalid:" + port + ": Address already in use"));
  }
}

}  // namespace
}  // namespace sluice::testing
