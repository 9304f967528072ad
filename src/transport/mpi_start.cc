#include "transport/mpi_start.h"

#include <cstring>
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

constexpr int kHelloTag = 20941, kSecondHelloTag = 20943;
/// How long the second roll call waits for an answer.
constexpr milliseconds kAnswer{500};

/// True once `request` is complete; bounded.
bool complete_by(MPI_Request& request, Clock::time_point deadline) {
  Backoff backoff;
  for (int done = 0;;) {
    const bool is_last_look = Clock::now() >= deadline;
    SLUICE_MPI(MPI_Test, &request, &done, MPI_STATUS_IGNORE);
    if (done) return true;
    if (is_last_look) return false;
    backoff.pause();
  }
}

struct MpiHello {
  char text[64] = {};
};

/// Each process sends its version to all and hears all. Throws: kPeerTimeout naming the missing.
void roll_call(int rank, int num_ranks, int tag, milliseconds timeout, const char* operation) {
  const auto deadline = Clock::now() + timeout;
  // Left to MPI when somebody is missing: it may still write there.
  auto heard = std::make_unique<std::vector<MpiHello>>(static_cast<std::size_t>(num_ranks));
  auto mine = std::make_unique<MpiHello>();
  fmt::format_to_n(mine->text, sizeof(mine->text) - 1, "sluice {}", version());
  std::vector<MPI_Request> in(heard->size(), MPI_REQUEST_NULL), out = in;
  for (int r = 0; r < num_ranks; ++r) {
    if (r == rank) continue;
    const auto i = static_cast<std::size_t>(r);
    SLUICE_MPI(MPI_Irecv, (*heard)[i].text, sizeof(MpiHello), MPI_BYTE, r, tag, MPI_COMM_WORLD,
               &in[i]);
    SLUICE_MPI(MPI_Isend, mine->text, sizeof(MpiHello), MPI_BYTE, r, tag, MPI_COMM_WORLD, &out[i]);
  }
  std::vector<int> missing;
  for (std::size_t r = 0; r < in.size(); ++r) {
    if (complete_by(in[r], deadline) && complete_by(out[r], deadline)) continue;
    missing.push_back(static_cast<int>(r));
  }
  if (!missing.empty()) {
    (void)heard.release();
    (void)mine.release();
    fail_of_ranks(ErrorCode::kPeerTimeout, missing,
                  "{} on rank {}: after {} ms still missing rank(s){}", operation, rank,
                  timeout.count(), list_of(missing));
  }
  (*heard)[static_cast<std::size_t>(rank)] = *mine;
  for (std::size_t r = 0; r < heard->size(); ++r) {
    const MpiHello& theirs = (*heard)[r];
    if (std::memcmp(&theirs, mine.get(), sizeof(MpiHello)) == 0) continue;
    fail(ErrorCode::kTransport, "ranks disagree on version: rank {} has '{}', rank {} has '{}'",
         rank, mine->text, r, std::string(theirs.text, strnlen(theirs.text, sizeof(theirs.text))));
  }
}

/// A communicator of our own, so that the program's messages and ours cannot meet.
///
/// MPI does not say which process keeps it waiting. So a process that gives up holds a second roll
/// call. Its first message makes the others join in, wherever they are in waits of their own: one
/// whose wait began later is not missing.
MPI_Comm make_communicator(int rank, int num_ranks, milliseconds timeout) {
  auto comm = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
  MPI_Request request = MPI_REQUEST_NULL;
  SLUICE_MPI(MPI_Comm_idup, MPI_COMM_WORLD, comm.get(), &request);
  Backoff backoff;
  const auto deadline = Clock::now() + timeout;
  for (int done = 0, is_asked = 0;;) {
    const bool is_last_look = Clock::now() >= deadline;
    SLUICE_MPI(MPI_Test, &request, &done, MPI_STATUS_IGNORE);
    if (done) return *comm;
    SLUICE_MPI(MPI_Iprobe, MPI_ANY_SOURCE, kSecondHelloTag, MPI_COMM_WORLD, &is_asked,
               MPI_STATUS_IGNORE);
    if (is_asked || is_last_look) break;
    backoff.pause();
  }
  (void)comm.release();  // MPI may still write there.
  roll_call(rank, num_ranks, kSecondHelloTag, kAnswer, "second roll call of the MPI transport");
  fail(ErrorCode::kPeerTimeout, "MPI_Comm_idup on rank {}: not complete after {} ms", rank,
       timeout.count());
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
  roll_call(start.rank, start.num_ranks, kHelloTag, timeout, "start of the MPI transport");
  start.comm = make_communicator(start.rank, start.num_ranks, timeout);
  SLUICE_MPI(MPI_Comm_set_errhandler, start.comm, MPI_ERRORS_RETURN);
  return start;
}

}  // namespace sluice
