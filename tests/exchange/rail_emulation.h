// rail_emulation.h - the exchange for GPUs of several hosts without a GPU: the steps of its kernels
// on the ranks' threads, rails over the fake of NCCL, and mates in one process.
//
// What is tried here is all of the exchange but the launches of its kernels and NCCL itself: what
// every step computes, flags and waits between ranks, order and sizes of what crosses the network,
// timeouts, and whom an error names.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "emulated_stream.h"
#include "exchange/cuda/rail_combine.cuh"
#include "exchange/cuda/rail_exchange.h"
#include "exchange/cuda/rail_place.cuh"
#include "exchange/cuda/rail_route.cuh"
#include "exchange/cuda/rail_spread.cuh"
#include "multirank/run_ranks.h"
#include "transport/fake_nccl.h"
#include "transport/nccl_rail.h"
#include "transport/tcp_ranks.h"
#include "two_level_model.h"

namespace sluice::testing {

/// A rank of hosts that all are in this process.
class EmulatedHosts final : public RailTransport {
 public:
  EmulatedHosts(Transport& world, std::unique_ptr<Transport> mates, FakeNccl& nccl,
                const TcpConfig& meeting, Hosts hosts, std::chrono::milliseconds timeout)
      : world_(world),
        mates_(std::move(mates)),
        hosts_(std::move(hosts)),
        api_(nccl.api()),
        link_(meeting, timeout) {
    // Work on no stream of its own goes to one that the fake knows.
    const auto stream_of = [this](void* stream) {
      return stream != nullptr ? stream : stream_.get();
    };
    api_.send = [send = api_.send, stream_of](const void* data, std::size_t bytes, int peer,
                                              NcclComm comm, void* stream) {
      return send(data, bytes, peer, comm, stream_of(stream));
    };
    api_.receive = [receive = api_.receive, stream_of](void* data, std::size_t bytes, int peer,
                                                       NcclComm comm, void* stream) {
      return receive(data, bytes, peer, comm, stream_of(stream));
    };
    NcclRailConfig config{.host = hosts_.host_of(rank()), .timeout = timeout};
    for (int h = 0; h < hosts_.num_hosts(); ++h) config.members.push_back(hosts_.relay(rank(), h));
    for (int r = 0; r < num_ranks(); ++r) {
      config.hosts.push_back("host-" + std::to_string(hosts_.host_of(r)));
    }
    if (config.host == 0) (void)api_.new_id(&config.id);
    const auto ids = world_.all_gather(config.id, timeout);
    std::ranges::copy(ids[static_cast<std::size_t>(config.members[0])], config.id.begin());
    rail_ = std::make_unique<NcclRail>(api_, link_, std::move(config));
  }

  [[nodiscard]] int rank() const noexcept override { return world_.rank(); }
  [[nodiscard]] int num_ranks() const noexcept override { return world_.num_ranks(); }
  [[nodiscard]] std::string name() const override { return "nccl"; }
  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t, int,
                                                    std::chrono::milliseconds) override {
    throw Error(ErrorCode::kUnsupported, "no windows between hosts");
  }
  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    return world_.all_gather(mine, timeout);
  }
  [[nodiscard]] TransportCounters counters() const override { return world_.counters(); }
  [[nodiscard]] Hosts hosts() const override { return hosts_; }
  [[nodiscard]] Rail* rail() const noexcept override { return rail_.get(); }
  [[nodiscard]] Transport& mates() const noexcept override { return *mates_; }
  [[nodiscard]] const std::shared_ptr<EmulatedStream>& stream() const noexcept { return stream_; }

 private:
  Transport& world_;
  std::unique_ptr<Transport> mates_;
  Hosts hosts_;
  NcclApi api_;
  std::shared_ptr<EmulatedStream> stream_ = std::make_shared<EmulatedStream>();
  TcpLink link_;
  std::unique_ptr<NcclRail> rail_;
};

/// Takes the steps of each kernel on the stream, one CTA after the other, a single thread in each.
class EmulatedDevice final : public RailDevice {
 public:
  EmulatedDevice(EmulatedStream& stream, float s1) : stream_(stream), s1_(s1) {}

  void use() override {}
  std::shared_ptr<std::byte> map_host(std::size_t bytes) override {
    auto* const memory = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{128}));
    std::fill_n(memory, bytes, std::byte{0});
    return {memory, [](std::byte* p) { ::operator delete (p, std::align_val_t{128}); }};
  }
  void reach(const std::byte*) override {}
  void clear(void* memory, std::size_t bytes, Stream) override { std::memset(memory, 0, bytes); }
  int count_ctas(Transport&, const ExchangeConfig&) override { return 3; }
  bool is_capturing(Stream) override { return stream_.is_capturing(); }
  void synchronize(Stream) override { stream_.synchronize(); }

  void route(const cuda::RailSlot& p, const cuda::RailTokens& d, Stream) override {
    launch([p, d] { cuda::route_step(kAlone, p, d); });
  }
  void pack(const cuda::RailSlot& p, const cuda::RailTokens& d, WireFormat wire, int,
            Stream) override {
    launch([p, d, wire, s1 = s1_] {
      if (cuda::is_stopped(p)) return;
      for (int t = 0; t < d.num_tokens; ++t) {
        alignas(16) std::array<std::byte, 8192> row{};
        const auto bytes = wire_bytes(d.x + std::int64_t{t} * p.hidden, p.hidden, wire, s1);
        std::ranges::copy(bytes, row.begin());
        cuda::pack_step(kAlone, p, d, t, row.data(),
                        reinterpret_cast<const float*>(row.data() + p.record.payload_bytes));
      }
    });
  }
  void sizes(const cuda::RailSlot& p, Stream) override {
    launch([p] { cuda::sizes_step(kAlone, p); });
  }
  void place(const cuda::RailSlot& p, const cuda::RailTokens& d, Stream) override {
    launch([p, d] {
      std::vector<std::vector<std::int32_t>> words(static_cast<std::size_t>(p.num_hosts));
      std::vector<cuda::PlaceSpace> spaces;
      for (auto& of_host : words) {
        of_host.assign(static_cast<std::size_t>(cuda::words_of_place(p)), -1);
        spaces.push_back(cuda::place_space(p, of_host.data()));
      }
      for (int h = 0; h < p.num_hosts; ++h) {
        cuda::count_step(kAlone, p, h, spaces[static_cast<std::size_t>(h)]);
      }
      for (int h = 0; h < p.num_hosts; ++h) {
        cuda::place_step(kAlone, p, d, h, spaces[static_cast<std::size_t>(h)]);
      }
    });
  }
  void spread(const cuda::RailSlot& p, int, Stream) override {
    launch([p] {
      const bool is_idle = cuda::is_stopped(p) || p.slot->refused != 0;
      for (int i = 0; !is_idle && i < p.max_tokens; ++i) {
        for (int h = 0; h < p.num_hosts; ++h) cuda::spread_step(kAlone, p, h, i);
      }
      cuda::finish_step(kAlone, p);
    });
  }
  void give(const cuda::RailSlot& p, bool dropped, Stream) override {
    launch([p, dropped] { cuda::give_step(kAlone, p, dropped); });
  }
  void relay(const cuda::RailSlot& p, bool sends, int, Stream) override {
    launch([p, sends] {
      cuda::begin_operation(p);
      if (sends) cuda::give_step(kAlone, p, false);
      cuda::await_step(kAlone, p);
      const Space space(p);
      for (int i = 0; i < p.max_tokens; ++i) {
        for (int h = 0; h < p.num_hosts; ++h) cuda::relay_step(kAlone, p, h, i, space.space());
      }
    });
  }
  void sum(const cuda::RailSlot& p, const cuda::RailTokens& d, int, Stream) override {
    launch([p, d] {
      const Space space(p);
      cuda::check_home_step(kAlone, p);
      for (int t = 0; t < d.num_tokens; ++t) cuda::sum_step(kAlone, p, d, t, space.space());
      cuda::end_operation(p);
    });
  }
  void keep_rows(const cuda::RailSlot& p, const std::uint16_t* expert_y, int num_ctas,
                 Stream) override {
    launch([p, expert_y, num_ctas] {
      for (int l = 0; l < p.placement.num_local(); ++l) {
        for (int cta = 0; cta < num_ctas; ++cta) {
          cuda::keep_rows_step(kAlone, p, reinterpret_cast<const cuda::Vector*>(expert_y), l, cta,
                               num_ctas);
        }
      }
    });
  }

 private:
  static constexpr cuda::Team kAlone{0, 1};
  struct Space {
    explicit Space(const cuda::RailSlot& p)
        : rows(std::make_unique<cuda::RowsOfToken>()),
          levels(static_cast<std::size_t>(cuda::levels_of(p))) {}
    [[nodiscard]] cuda::SumSpace space() const {
      return {rows.get(), const_cast<cuda::Level*>(levels.data())};
    }
    std::unique_ptr<cuda::RowsOfToken> rows;
    std::vector<cuda::Level> levels;
  };

  /// A kernel begins when what crosses the network before it on its stream has ended.
  void launch(std::function<void()> kernel) {
    stream_.queue([&stream = stream_, kernel = std::move(kernel)] {
      while (stream.done < stream.begun) cuda::rest();
      kernel();
    });
  }

  EmulatedStream& stream_;
  float s1_;
};

/// Runs body(transport) for every rank of `hosts`, a thread each; returns what each threw.
template <class Body>
std::vector<std::exception_ptr> try_emulated_hosts(const Hosts& hosts,
                                                   std::chrono::milliseconds timeout,
                                                   const Body& body, FakeNccl& nccl) {
  const TcpJob job(hosts.num_ranks());
  auto worlds = make_inproc_transports(hosts.num_ranks());
  std::vector<std::unique_ptr<Transport>> mates(worlds.size());
  for (int h = 0; h < hosts.num_hosts(); ++h) {
    const auto ranks = hosts.ranks_of(h);
    auto made = make_inproc_transports(static_cast<int>(ranks.size()));
    for (std::size_t m = 0; m < ranks.size(); ++m) {
      mates[static_cast<std::size_t>(ranks[m])] = std::move(made[m]);
    }
  }
  return try_on_every_rank(hosts.num_ranks(), [&](int r) {
    const auto i = static_cast<std::size_t>(r);
    EmulatedHosts transport(*worlds[i], std::move(mates[i]), nccl, job.config(r), hosts, timeout);
    body(transport);
  });
}
template <class Body>
std::vector<std::exception_ptr> try_emulated_hosts(const Hosts& hosts,
                                                   std::chrono::milliseconds timeout,
                                                   const Body& body) {
  FakeNccl nccl;
  return try_emulated_hosts(hosts, timeout, body, nccl);
}

}  // namespace sluice::testing
