// The main of tests with ranks: `test` runs them as threads, `mpirun -n N test --transport mpi` and
// `test --transport ipc --processes N` as processes. Then only process 0 reports what passes, and
// each reports what it saw fail. `--transport nccl --processes N --hosts H` takes them for H hosts.
#include <gmock/gmock.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "multirank/run_ranks.h"
#include "sluice/lab/ranks.h"

namespace sluice::testing {
namespace {

class FailuresOfRank final : public ::testing::EmptyTestEventListener {
 public:
  explicit FailuresOfRank(int rank) : rank_(rank) {}
  void OnTestStart(const ::testing::TestInfo& test) override {
    test_ = std::string(test.test_suite_name()) + "." + test.name();
  }
  // Called under a lock of gtest's: it must not be asked which test is running.
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::fprintf(stderr, "rank %d: %s: %s:%d: %s\n", rank_, test_.c_str(),
                 result.file_name() ? result.file_name() : "", result.line_number(),
                 result.message());
  }

 private:
  int rank_;
  std::string test_;
};

int run_as_rank(const std::string& transport) {
  start_processes(transport);
  const int rank = control_transport()->rank();
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOfRank(rank));
  }
  const int status = RUN_ALL_TESTS();
  if (!end_processes()) {
    std::fprintf(stderr, "rank %d: not every process reached the end\n", rank);
    return 1;
  }
  return status;
}

}  // namespace
}  // namespace sluice::testing

int main(int argc, char** argv) {
  std::map<std::string, std::string> given = {
      {"--transport", "inproc"}, {"--processes", "2"}, {"--hosts", "1"}};
  for (int i = 1; i + 1 < argc; ++i) {
    if (given.count(argv[i])) given[argv[i]] = argv[i + 1];
  }
  const bool starts_processes = given["--transport"] == "ipc" || given["--transport"] == "nccl";
  if (starts_processes && !sluice::read_job_place()) {
    return sluice::run_as_processes(std::stoi(given["--processes"]),
                                    sluice::testing::kProcessTimeout);
  }
  if (given["--transport"] == "nccl") {
    const sluice::JobPlace place = sluice::read_job_place().value();
    const int host = place.rank * std::stoi(given["--hosts"]) / place.num_ranks;
    setenv("NCCL_HOSTID", ("virtual-host-" + std::to_string(host)).c_str(), 1);
  }
  ::testing::InitGoogleMock(&argc, argv);
  if (given["--transport"] == "inproc") return RUN_ALL_TESTS();
  return sluice::testing::run_as_rank(given["--transport"]);
}
