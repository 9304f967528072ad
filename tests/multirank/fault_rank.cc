// One rank of the fault matrix: `mpirun -n 4 --enable-recovery fault_rank --fault kill --at
// combine`, or `fault_rank --transport ipc ...`, which starts four of itself. Ranks run dispatch
// and combine, checked row by row, until the fault strikes; every rank then prints one line that
// fault_matrix.py reads:
//
//   fault_rank 1: at <ms> in a call since <ms> waited <ms> [<error code or ok>]
//       ranks <Error::ranks()>: <message>
//
// `waited` is for how long this rank's threads stood ready, from the start on, and had no
// processor. The clock is the monotonic one. A rank that is killed prints nothing. `--late 3` lets
// rank 3 come later to the place of the fault. `--hosts 2` puts the ranks on as many hosts. Over
// MPI a second line says whether the rank ended MPI or left it.
#include <fmt/core.h>
#include <gtest/gtest-spi.h>
#include <mpi.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>
#include <utility>

#include "core/fail.h"
#include "exchange/exchange_model.h"
#include "multirank/moving_layer.h"
#include "multirank/run_ranks.h"
#include "sluice/lab/ranks.h"
#include "support/forwarding_transport.h"
#include "support/processor_wait.h"
#include "support/scalar_backend.h"

namespace {

using namespace std::chrono_literals;
using namespace sluice;
using sluice::testing::make_traffic;
using sluice::testing::ScalarBackend;
using sluice::testing::Traffic;

struct Options {
  std::string fault =
      "none";  // none kill stop slow truncate corrupt lose order capacity stranger flood
  std::string at = "dispatch";  // start hello communicator half-communicator before-creation
                                // creation before-dispatch dispatch before-combine combine
                                // after-combine before-rebalance rebalance after-rebalance end
  int victim = 2;
  int late = -1;  // Another rank, or none.
  int round = 3;
  int timeout_ms = 2000;
  int hosts = 1;
  Mode mode = Mode::kLowLatency;
  std::string transport = "mpi";
};
Options options;
int this_rank = -1;

/// When the fault began, for all processes of this machine alike.
std::int64_t now_ms() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return std::int64_t{t.tv_sec} * 1000 + t.tv_nsec / 1'000'000;
}
/// When this rank began the call that it is in, which may be after the fault on a busy machine.
std::atomic<std::int64_t> call_began{0};
void begin_call() {
  call_began = now_ms();
}
void note_fault() {
  fmt::print("fault_rank began at {}\n", now_ms());
  std::fflush(stdout);
}

void here(const char* place, int round);

// --- Faults of messages: MPI's profiling interface lets a program stand between MPI and itself.
std::atomic<bool> spoil_next{false};

}  // namespace

extern "C" int MPI_Isend(const void* bytes, int count, MPI_Datatype type, int to, int tag,
                         MPI_Comm comm, MPI_Request* request) {
  static std::vector<std::vector<char>> kept;
  PMPI_Comm_rank(MPI_COMM_WORLD, &this_rank);
  // The first words of a process have 64 bytes. Ranks hear them in their order.
  const bool is_hello = this_rank == options.victim && count == 64;
  if (is_hello && to > this_rank) here("hello", options.round);
  if (options.fault == "stranger" && is_hello) {
    // The first words of another program.
    note_fault();
    kept.emplace_back(64, 0);
    std::strcpy(kept.back().data(), "sluice 9.9.9");
    return PMPI_Isend(kept.back().data(), count, type, to, tag, comm, request);
  }
  if (to == 0 && count > 300 && spoil_next.exchange(false)) {
    note_fault();
    std::vector<char>& copy = kept.emplace_back(static_cast<std::size_t>(count));
    std::memcpy(copy.data(), bytes, copy.size());
    if (options.fault == "corrupt") copy[copy.size() / 2] ^= 0x10;
    if (options.fault == "truncate") count -= 64;
    if (options.fault == "lose") {
      *request = MPI_REQUEST_NULL;
      return MPI_SUCCESS;
    }
    return PMPI_Isend(copy.data(), count, type, to, tag, comm, request);
  }
  return PMPI_Isend(bytes, count, type, to, tag, comm, request);
}

// Between the first messages of all processes and the transport's own communicator.
namespace {
MPI_Request* making_communicator = nullptr;
}
extern "C" int MPI_Comm_idup(MPI_Comm comm, MPI_Comm* copy, MPI_Request* request) {
  PMPI_Comm_rank(MPI_COMM_WORLD, &this_rank);
  here("communicator", options.round);
  making_communicator = request;
  return PMPI_Comm_idup(comm, copy, request);
}

// "half-communicator": the victim has it, and so have others; on rank 0 it never comes.
extern "C" int MPI_Test(MPI_Request* request, int* done, MPI_Status* status) {
  const int result = PMPI_Test(request, done, status);
  if (request != making_communicator || !*done) return result;
  if (options.at == "half-communicator" && options.fault != "slow" && this_rank == 0) *done = 0;
  if (*done) {
    making_communicator = nullptr;
    here("half-communicator", options.round);
  }
  return result;
}

namespace {

/// Called at every place where the fault could strike.
void here(const char* place, int round) {
  static bool struck = false;
  if (this_rank != options.victim && this_rank != options.late) return;
  if (round != options.round || options.at != place || std::exchange(struck, true)) return;
  if (this_rank == options.late) {
    std::this_thread::sleep_for(std::chrono::milliseconds(options.timeout_ms * 3 / 10));
    return;
  }
  if (options.fault == "kill" || options.fault == "stop" || options.fault == "flood") {
    note_fault();
    std::this_thread::sleep_for(20ms);  // mpirun still has to carry the line away.
    kill(getpid(), options.fault == "kill" ? SIGKILL : SIGSTOP);
  } else if (options.fault == "slow") {
    note_fault();
    std::this_thread::sleep_for(std::chrono::milliseconds(options.timeout_ms / 2));
  } else if (options.fault == "corrupt" || options.fault == "truncate" || options.fault == "lose") {
    spoil_next = true;
  }
}

/// A transport that tells when a wait begins: the middle of an operation.
class MiddleWindow final : public sluice::testing::ForwardingWindow {
 public:
  MiddleWindow(std::unique_ptr<Window> inner, const int& round, const std::string& operation)
      : ForwardingWindow(std::move(inner)), round_(round), operation_(operation) {}
  void put(int peer, std::size_t offset, std::span<const std::byte> data) override {
    // Half-way through what goes to a peer: some rows are there, no flag is.
    if (data.size() > 64) here(operation_.c_str(), round_);
    ForwardingWindow::put(peer, offset, data);
  }

 private:
  const int& round_;
  const std::string& operation_;
};

class MiddleTransport final : public sluice::testing::ForwardingTransport {
 public:
  using ForwardingTransport::ForwardingTransport;
  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override {
    here("creation", options.round);
    begin_call();
    return std::make_unique<MiddleWindow>(
        ForwardingTransport::make_window(bytes, num_flags, timeout), round, operation);
  }
  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    begin_call();
    return ForwardingTransport::all_gather(mine, timeout);
  }

  int round = 0;
  std::string operation;
};

/// False if any row differs from the definition.
bool is_exact(const Traffic& t, const ExchangeConfig& config, int r, const ExpertBatch& batch,
              std::vector<std::uint16_t>& rows) {
  ::testing::TestPartResultArray failed;
  ::testing::ScopedFakeTestPartResultReporter reporter(
      ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ALL_THREADS, &failed);
  sluice::testing::check_batch(t, config, r, batch, rows);
  return failed.size() == 0;
}

/// Far more than may be under way, to a rank that has stopped taking anything.
void flood(Transport& world) {
  const auto timeout = std::chrono::milliseconds(options.timeout_ms);
  const auto window = world.make_window(1 << 20, 1, timeout);
  if (this_rank == options.victim) here("put", options.round);
  const std::vector<std::byte> data(1 << 20);
  begin_call();
  for (int i = 0; i < 64; ++i) window->put(options.victim, 0, data);
}

/// A layer whose experts move after every call.
void moving_rounds(Transport& world) {
  MiddleTransport transport(world);
  sluice::testing::MovingLayer layer(transport, options.mode,
                                     std::chrono::milliseconds(options.timeout_ms));
  for (int& round = transport.round; round < 2 * options.round; ++round) {
    transport.operation = "forward";
    begin_call();
    if (!layer.forward_is_exact()) throw std::logic_error("wrong rows");
    here("before-rebalance", round);
    transport.operation = "rebalance";
    begin_call();
    layer.move();
    here("after-rebalance", round);
  }
}

void rounds(Transport& world) {
  if (options.fault == "flood") return flood(world);
  if (options.at.ends_with("rebalance")) return moving_rounds(world);
  const bool differs = options.fault == "capacity" && this_rank == options.victim;
  if (differs) note_fault();
  const ExchangeConfig config{.mode = options.mode,
                              .num_experts = 8,
                              .num_topk = 2,
                              .hidden = 1024,
                              .max_tokens_per_rank = differs ? 9 : 8,
                              .hosts = options.hosts > 1 ? Hosts::even(options.hosts, 4) : Hosts(),
                              .peer_timeout = std::chrono::milliseconds(options.timeout_ms)};
  const Traffic t = make_traffic({8, 6, 7, 8}, 8, 2, 1024, 4);
  MiddleTransport transport(world);
  ScalarBackend backend;
  here("before-creation", options.round);
  Exchange exchange = Exchange::create(config, transport, backend);
  for (int& round = transport.round; round < 2 * options.round; ++round) {
    here("before-dispatch", round);
    if (options.fault == "order" && round == options.round && this_rank == options.victim) {
      // Drops this round's rows and dispatches again where the others combine.
      note_fault();
      (void)exchange.dispatch(t.x_view(this_rank), t.routing(this_rank), {});
    }
    transport.operation = "dispatch";
    begin_call();
    Dispatched d = exchange.dispatch(t.x_view(this_rank), t.routing(this_rank), {});
    std::vector<std::uint16_t> rows,
        y(static_cast<std::size_t>(t.num_tokens[this_rank] * t.hidden));
    if (!is_exact(t, config, this_rank, d.batch(), rows)) throw std::logic_error("wrong rows");
    MutableTensorView out;
    out.data = y.data(), out.dtype = DType::kBFloat16;
    out.shape = Shape{t.num_tokens[this_rank], t.hidden};
    const TensorView expert_y(rows.data(), DType::kBFloat16, d.batch().x.shape);
    here("before-combine", round);
    transport.operation = "combine";
    begin_call();
    exchange.combine(std::move(d), expert_y, out, {});
    here("after-combine", round);
  }
}

int run() {
  sluice::testing::ProcessorWait processor_wait;
  std::string code = "ok", text;
  std::vector<int> ranks;
  try {
    if (options.transport == "ipc") {
      this_rank = read_job_place().value().rank;
      here("start", options.round);
    } else if (options.at ==
               "start") {  // The program starts MPI, and the fault strikes before Sluice.
      int level = 0;
      MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level);
      MPI_Comm_rank(MPI_COMM_WORLD, &this_rank);
      here("start", options.round);
    }
    begin_call();
    const auto world = sluice::testing::make_process_transport(
        options.transport, 0, std::chrono::milliseconds(options.timeout_ms));
    this_rank = world->rank();
    rounds(*world);
  } catch (const Error& error) {
    code = to_string(error.code()), text = error.what(), ranks = error.ranks();
  } catch (const std::exception& error) {
    code = "wrong", text = error.what();
  }
  const std::int64_t at = now_ms();
  fmt::print("fault_rank {}: at {} in a call since {} waited {} [{}] ranks{}: {}\n", this_rank, at,
             call_began.load(), processor_wait.so_far().count(), code, list_of(ranks), text);
  std::fflush(stdout);
  if (options.transport == "ipc") return code == "ok" ? 0 : 4;
  here("end", options.round);
  // With a rank gone there is no end of MPI to wait for.
  const bool ended = end_mpi(500ms);
  fmt::print("rank {} {} MPI\n", this_rank, ended ? "ended" : "left");
  std::fflush(stdout);
  if (!ended) std::_Exit(4);
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (initialized && !finalized && code == "ok") MPI_Finalize();
  return code == "ok" ? 0 : 4;
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> given;
  for (int i = 1; i + 1 < argc; i += 2) given[argv[i]] = argv[i + 1];
  if (given.count("--fault")) options.fault = given["--fault"];
  if (given.count("--at")) options.at = given["--at"];
  if (given.count("--late")) options.late = std::stoi(given["--late"]);
  if (given.count("--mode")) options.mode = parse_mode(given["--mode"]);
  if (given.count("--hosts")) options.hosts = std::stoi(given["--hosts"]);
  if (given.count("--timeout-ms")) options.timeout_ms = std::stoi(given["--timeout-ms"]);
  if (given.count("--transport")) options.transport = given["--transport"];
  if (options.transport == "ipc" && !read_job_place()) {
    // Longer than any survivor needs, so that none is ended before it speaks.
    return sluice::run_as_processes(4, std::chrono::milliseconds(options.timeout_ms + 2'000));
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // A stopped rank does not outlive its launcher.
  return run();
}
