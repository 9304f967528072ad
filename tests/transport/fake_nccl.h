// fake_nccl.h - NCCL's functions over host memory of one process, for testing what calls them.
//
// This is not NCCL: it has no devices, no network and no kernels, and it says nothing of whether
// NCCL does what its documents say. It keeps their rules for the few functions of NcclApi, so that
// everything around NCCL can be tried without a GPU: who is connected with whom, timeouts, aborts,
// and whom an error names. It can be slow, fail and hang.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fake_gather.h"
#include "fake_stream.h"
#include "transport/nccl_api.h"

namespace sluice::testing {

class FakeNccl {
 public:
  static constexpr int kRemoteError = 6;

  /// As many polls as NCCL takes for what it does on the host; after that it is done.
  std::atomic<int> num_polls{2};
  /// Operations take this much longer to be complete.
  std::atomic<bool> holds_operations{false};
  std::atomic<bool> abort_hangs{false};
  /// An abort is in effect only after so long. Until then what is queued moves on.
  std::atomic<int> abort_takes_ms{0};
  /// Whoever waits for a rank that aborts gets an error, as over sockets.
  std::atomic<bool> aborts_break_connections{false};
  std::atomic<int> num_aborted{0};
  /// Of every communicator, from now on.
  std::atomic<int> async_status{kNcclSuccess};

  [[nodiscard]] NcclApi api() {
    NcclApi api;
    api.version = kMinNcclVersion;
    api.path = "fake_nccl.h";
    api.num_devices = 1;
    api.error_string = [](int status) {
      return status == kRemoteError ? "remote process exited" : "some other error";
    };
    api.last_error = [](NcclComm) { return "said by the fake"; };
    api.new_id = [this](NcclId* id) {
      const std::uint64_t number = ++num_ids_;
      id->fill(std::byte{0});
      std::memcpy(id->data(), &number, sizeof(number));
      return kNcclSuccess;
    };
    api.init = [this](NcclComm* comm, int num_ranks, const NcclId& id, int rank, int) {
      return init(comm, num_ranks, id, rank);
    };
    api.async_error = [this](NcclComm comm, int* status) {
      *status = poll(*static_cast<Comm*>(comm));
      return kNcclSuccess;
    };
    api.abort = [this](NcclComm comm) { return abort(static_cast<Comm*>(comm)); };
    api.group_start = [] { return kNcclSuccess; };
    api.send = [this](const void* data, std::size_t bytes, int peer, NcclComm comm, void* stream) {
      return post(comm, {const_cast<void*>(data), bytes, peer, true}, stream);
    };
    api.receive = [this](void* data, std::size_t bytes, int peer, NcclComm comm, void* stream) {
      return post(comm, {data, bytes, peer, false}, stream);
    };
    api.group_end = [this] { return end_group(); };
    api.count = [](NcclComm comm, int* n) {
      return *n = static_cast<Comm*>(comm)->world->num_ranks, kNcclSuccess;
    };
    api.user_rank = [](NcclComm comm, int* rank) {
      return *rank = static_cast<Comm*>(comm)->rank, kNcclSuccess;
    };
    api.gather = [](NcclComm comm, const std::byte* mine, std::size_t bytes, std::byte* all,
                    std::chrono::milliseconds timeout) {
      const Comm& c = *static_cast<Comm*>(comm);
      return c.world->gathered.gather(c.rank, c.world->num_ranks, {mine, bytes}, all, timeout);
    };
    return api;
  }

 private:
  struct World {
    int num_ranks = 0, num_joined = 0;
    FakeGather gathered;
  };
  struct Operation {
    void* data;
    std::size_t bytes;
    int peer;
    bool is_send;
  };
  struct Group {
    FakeStream* stream = nullptr;
    std::size_t num_left = 0;
  };
  struct Posted {
    Operation operation;
    std::shared_ptr<Group> group;
  };
  struct Comm {
    std::shared_ptr<World> world;
    int rank;
    int polls_left;
    std::vector<Operation> open = {};  // Of the group under way.
    FakeStream* stream = nullptr;
    std::shared_ptr<Group> latest = nullptr;
    bool is_aborted = false;
    int status = kNcclSuccess;
  };

  int init(NcclComm* comm, int num_ranks, const NcclId& id, int rank) {
    const std::lock_guard lock(mutex_);
    auto& world = worlds_[id];
    if (!world) world = std::make_shared<World>();
    world->num_ranks = num_ranks;
    world->num_joined += 1;
    const auto made = std::make_shared<Comm>(Comm{world, rank, num_polls});
    comms_[made.get()] = made;
    *comm = made.get();
    return kNcclInProgress;
  }

  int poll(Comm& comm) {
    const std::lock_guard lock(mutex_);
    if (async_status != kNcclSuccess) return async_status;
    if (comm.status != kNcclSuccess) return comm.status;
    if (comm.world->num_joined < comm.world->num_ranks) return kNcclInProgress;
    return comm.polls_left > 0 && comm.polls_left-- > 0 ? kNcclInProgress : kNcclSuccess;
  }

  int abort(Comm* comm) {
    while (abort_hangs) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::this_thread::sleep_for(std::chrono::milliseconds(abort_takes_ms));
    const std::lock_guard lock(mutex_);
    comm->is_aborted = true;
    for (auto& [key, queue] : posted_) {
      if (key.world != comm->world.get() || (key.from != comm->rank && key.to != comm->rank)) {
        continue;
      }
      const int owner = key.is_send ? key.from : key.to;
      for (const auto& [at, other] : comms_) {
        const bool waits = other->world == comm->world && other->rank == owner && !queue.empty();
        if (waits && aborts_break_connections) other->status = kRemoteError;
      }
      queue.clear();
    }
    if (comm->latest) end(*comm->latest);  // An abort ends the kernel that waits.
    num_aborted += 1;
    comms_.erase(comm);
    return kNcclSuccess;
  }

  int post(NcclComm comm, const Operation& operation, void* stream) {
    auto& c = *static_cast<Comm*>(comm);
    c.open.push_back(operation);
    c.stream = static_cast<FakeStream*>(stream);
    open_.push_back(&c);
    return kNcclSuccess;
  }

  int end_group() {
    std::sort(open_.begin(), open_.end());
    open_.erase(std::unique(open_.begin(), open_.end()), open_.end());
    for (Comm* const open : open_) {
      std::shared_ptr<Comm> comm;
      {
        const std::lock_guard lock(mutex_);
        comm = comms_.at(open);
        comm->polls_left = num_polls;
      }
      FakeStream* const stream = comm->stream;
      auto operations = std::exchange(comm->open, {});
      // It may run more than once, as in a graph.
      stream->queue([this, comm, stream, operations = std::move(operations)] {
        const std::lock_guard lock(mutex_);
        if (comm->is_aborted) return;
        const auto group = std::make_shared<Group>();
        group->stream = stream, group->num_left = operations.size();
        comm->latest = group;
        stream->begun += 1;
        for (const Operation& operation : operations) meet(*comm, {operation, group});
      });
    }
    open_.clear();
    return kNcclInProgress;
  }

  struct Key {
    World* world;
    int from, to;
    bool is_send;
    auto operator<=>(const Key&) const = default;
  };

  /// Joins an operation with its counterpart, or leaves it for that.
  void meet(const Comm& comm, Posted posted) {
    const bool is_send = posted.operation.is_send;
    const int from = is_send ? comm.rank : posted.operation.peer;
    const int to = is_send ? posted.operation.peer : comm.rank;
    auto& others = posted_[{comm.world.get(), from, to, !is_send}];
    if (others.empty() || holds_operations) {
      posted_[{comm.world.get(), from, to, is_send}].push_back(std::move(posted));
      return;
    }
    const Posted other = others.front();
    others.erase(others.begin());
    const Posted& send = is_send ? posted : other;
    const Posted& receive = is_send ? other : posted;
    const std::size_t bytes = std::min(send.operation.bytes, receive.operation.bytes);
    if (bytes > 0) std::memcpy(receive.operation.data, send.operation.data, bytes);
    for (const Posted* p : {&send, &receive}) {
      if (p->group->num_left == 1) end(*p->group);
      if (p->group->num_left > 0) p->group->num_left -= 1;
    }
  }
  static void end(Group& group) {
    if (group.num_left == 0) return;
    group.num_left = 0;
    group.stream->done += 1;
  }

  std::mutex mutex_;
  std::atomic<std::uint64_t> num_ids_{0};
  std::map<NcclId, std::shared_ptr<World>> worlds_;
  std::map<Comm*, std::shared_ptr<Comm>> comms_;  // Not aborted yet.
  std::map<Key, std::vector<Posted>> posted_;
  static inline thread_local std::vector<Comm*> open_;
};

}  // namespace sluice::testing
