#include "transport/mpi_start.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <string_view>
#include <utility>

#include "core/fail.h"
#include "sluice/config.h"

namespace sluice {

void check_mpi(int status, const char* call, std::vector<int> ranks) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(status, text, &length) != MPI_SUCCESS) length = 0;
  fail_of_ranks(ErrorCode::kTransport, std::move(ranks), "{}: {}", call,
                std::string_view(text, static_cast<std::size_t>(length)));
}

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// Of the first roll call, the second, and what a process says that has its communicator.
constexpr int kHelloTag = 20941, kSecondHelloTag = 20943, kReadyTag = 20944;
/// How long the second roll call waits for an answer.
constexpr milliseconds kAnswer{500};

/// One message from each process of the job to each other. What has not come when this ends, or has
/// not gone, is left to MPI: it may still write there.
class Greetings {
 public:
  Greetings(const MpiStart& start, int tag) : start_(start), tag_(tag) {
    in_.resize(static_cast<std::size_t>(start.num_ranks), MPI_REQUEST_NULL);
    out_ = in_;
    heard_->resize(in_.size());
    for (int r = 0; r < start_.num_ranks; ++r) {
      if (r == start_.rank) continue;
      const auto i = static_cast<std::size_t>(r);
      SLUICE_MPI(MPI_Irecv, (*heard_)[i].text, sizeof(Text), MPI_BYTE, r, tag_, MPI_COMM_WORLD,
                 &in_[i]);
    }
  }
  ~Greetings() {
    const auto is_pending = [](MPI_Request request) { return request != MPI_REQUEST_NULL; };
    if (std::ranges::any_of(in_, is_pending)) (void)heard_.release();
    if (std::ranges::any_of(out_, is_pending)) (void)mine_.release();
  }
  Greetings(const Greetings&) = delete;
  Greetings& operator=(const Greetings&) = delete;

  void send() {
    fmt::format_to_n(mine_->text, sizeof(mine_->text) - 1, "sluice {}", version());
    (*heard_)[static_cast<std::size_t>(start_.rank)] = *mine_;
    for (int r = 0; r < start_.num_ranks; ++r) {
      if (r == start_.rank) continue;
      SLUICE_MPI(MPI_Isend, mine_->text, sizeof(Text), MPI_BYTE, r, tag_, MPI_COMM_WORLD,
                 &out_[static_cast<std::size_t>(r)]);
    }
  }

  /// Whose message has not come, or who has not taken ours.
  [[nodiscard]] std::vector<int> missing() {
    std::vector<int> ranks;
    for (std::size_t r = 0; r < in_.size(); ++r) {
      int is_in = 0, is_out = 0;
      SLUICE_MPI(MPI_Test, &in_[r], &is_in, MPI_STATUS_IGNORE);
      SLUICE_MPI(MPI_Test, &out_[r], &is_out, MPI_STATUS_IGNORE);
      if (!is_in || !is_out) ranks.push_back(static_cast<int>(r));
    }
    return ranks;
  }
  [[nodiscard]] std::vector<int> missing_at(Clock::time_point deadline) {
    for (Backoff backoff;; backoff.pause()) {
      const bool is_last_look = Clock::now() >= deadline;
      std::vector<int> ranks = missing();
      if (ranks.empty() || is_last_look) return ranks;
    }
  }

  /// Throws: kTransport naming a process that runs another version.
  void check_versions() const {
    for (std::size_t r = 0; r < heard_->size(); ++r) {
      const Text& theirs = (*heard_)[r];
      if (std::memcmp(&theirs, mine_.get(), sizeof(Text)) == 0) continue;
      fail(ErrorCode::kTransport, "ranks disagree on version: rank {} has '{}', rank {} has '{}'",
           start_.rank, mine_->text, r,
           std::string(theirs.text, strnlen(theirs.text, sizeof(theirs.text))));
    }
  }

 private:
  struct Text {
    char text[64] = {};
  };
  const MpiStart& start_;
  int tag_;
  std::unique_ptr<std::vector<Text>> heard_ = std::make_unique<std::vector<Text>>();
  std::unique_ptr<Text> mine_ = std::make_unique<Text>();
  std::vector<MPI_Request> in_, out_;
};

[[noreturn]] void fail_missing(const MpiStart& start, const char* operation, milliseconds time,
                               const std::vector<int>& missing) {
  fail_of_ranks(ErrorCode::kPeerTimeout, missing,
                "{} on rank {}: after {} ms still missing rank(s){}", operation, start.rank,
                time.count(), list_of(missing));
}

/// Each process sends its version to all and hears all. Throws: kPeerTimeout naming the missing.
void roll_call(const MpiStart& start, milliseconds timeout) {
  Greetings hello(start, kHelloTag);
  hello.send();
  const std::vector<int> missing = hello.missing_at(Clock::now() + timeout);
  if (!missing.empty()) {
    // For those that have heard all and wait for their communicator: this rank has come, too.
    Greetings(start, kSecondHelloTag).send();
    fail_missing(start, "start of the MPI transport", timeout, missing);
  }
  hello.check_versions();
}

/// A communicator of our own, so that the program's messages and ours cannot meet.
///
/// MPI does not say which process keeps it waiting. So a process that gives up holds a second roll
/// call. Its first message makes the others join in, wherever they are in waits of their own: one
/// whose wait began later is not missing. Nor is one that has its communicator already. So nobody
/// goes on, and answers no more, until all have said that they have theirs; and whoever has said so
/// is not missing later.
MPI_Comm make_communicator(const MpiStart& start, milliseconds timeout) {
  auto comm = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
  MPI_Request request = MPI_REQUEST_NULL;
  SLUICE_MPI(MPI_Comm_idup, MPI_COMM_WORLD, comm.get(), &request);
  Greetings ready(start, kReadyTag);
  Backoff backoff;
  const auto begin = Clock::now(), deadline = begin + timeout;
  int has_it = 0;
  for (int is_asked = 0;;) {
    const bool is_last_look = Clock::now() >= deadline;
    if (!has_it) {
      SLUICE_MPI(MPI_Test, &request, &has_it, MPI_STATUS_IGNORE);
      if (has_it) ready.send();
    }
    if (ready.missing().empty() && has_it) return *comm;
    SLUICE_MPI(MPI_Iprobe, MPI_ANY_SOURCE, kSecondHelloTag, MPI_COMM_WORLD, &is_asked,
               MPI_STATUS_IGNORE);
    if (is_asked || is_last_look) break;
    backoff.pause();
  }
  const auto waited = std::chrono::duration_cast<milliseconds>(Clock::now() - begin);
  if (!has_it) (void)comm.release();  // MPI may still write there.
  Greetings second(start, kSecondHelloTag);
  second.send();
  const std::vector<int> silent = second.missing_at(Clock::now() + kAnswer);
  std::vector<int> missing;
  std::ranges::set_intersection(silent, ready.missing(), std::back_inserter(missing));
  if (!missing.empty()) {
    fail_missing(start, "second roll call of the MPI transport", kAnswer, missing);
  }
  fail(ErrorCode::kPeerTimeout,
       "MPI_Comm_idup on rank {}: not complete on every rank after {} ms, and a rank gave up",
       start.rank, waited.count());
}

}  // namespace

MpiStart start_mpi(milliseconds timeout) {
  MpiStart start;
  int running = 0, ended = 0, level = 0;
  SLUICE_MPI(MPI_Finalized, &ended);
  if (ended) fail(ErrorCode::kUnsupported, "MPI has been finalized and cannot be started again");
  SLUICE_MPI(MPI_Initialized, &running);
  if (running) {
    SLUICE_MPI(MPI_Query_thread, &level);
  } else {
    SLUICE_MPI(MPI_Init_thread, nullptr, nullptr, MPI_THREAD_SERIALIZED, &level);
    start.owns_mpi = true;
  }
  if (level < MPI_THREAD_SERIALIZED) {
    fail(ErrorCode::kUnsupported,
         "MPI runs with thread level {}, the transport needs MPI_THREAD_SERIALIZED ({})", level,
         static_cast<int>(MPI_THREAD_SERIALIZED));
  }
  SLUICE_MPI(MPI_Comm_set_errhandler, MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  SLUICE_MPI(MPI_Comm_rank, MPI_COMM_WORLD, &start.rank);
  SLUICE_MPI(MPI_Comm_size, MPI_COMM_WORLD, &start.num_ranks);
  roll_call(start, timeout);
  start.comm = make_communicator(start, timeout);
  SLUICE_MPI(MPI_Comm_set_errhandler, start.comm, MPI_ERRORS_RETURN);
  return start;
}

}  // namespace sluice
