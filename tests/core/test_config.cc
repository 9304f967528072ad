// What the environment says, and how it is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "sluice/config.h"
#include "sluice/error.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;

/// Every variable that config.cc reads, unset before a test and as it was after it.
class Config : public ::testing::Test {
 protected:
  Config() {
    for (const char* name : kNames) {
      const char* const value = std::getenv(name);
      if (value != nullptr) before_.emplace_back(name, value);
      unsetenv(name);
    }
  }
  ~Config() override {
    for (const char* name : kNames) unsetenv(name);
    for (const auto& [name, value] : before_) setenv(name.c_str(), value.c_str(), 1);
  }
  static void set(const char* name, const char* value) { setenv(name, value, 1); }

  /// The message of an invalid argument; fails if nothing is thrown.
  template <class Read>
  static std::string refusal(const Read& read) {
    try {
      (void)read();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    ADD_FAILURE() << "nothing was refused";
    return {};
  }

 private:
  static constexpr const char* kNames[] = {"SLUICE_DISPATCH_DTYPE",
                                           "SLUICE_TIMEOUT_MS",
                                           "SLUICE_RANK",
                                           "SLUICE_WORLD_SIZE",
                                           "SLUICE_JOB",
                                           "SLUICE_LOCAL_WORLD_SIZE",
                                           "SLUICE_SECRET",
                                           "SLUICE_MEETING",
                                           "NCCL_HOSTID",
                                           "RANK",
                                           "WORLD_SIZE",
                                           "LOCAL_WORLD_SIZE",
                                           "MASTER_ADDR",
                                           "MASTER_PORT",
                                           "TORCHELASTIC_RUN_ID",
                                           "OMPI_COMM_WORLD_RANK",
                                           "OMPI_COMM_WORLD_SIZE",
                                           "OMPI_COMM_WORLD_LOCAL_SIZE",
                                           "OMPI_MCA_ess_base_jobid",
                                           "PMIX_NAMESPACE",
                                           "SLURM_PROCID",
                                           "SLURM_NTASKS",
                                           "SLURM_JOB_ID",
                                           "SLURM_STEP_ID",
                                           "SLURM_STEP_NUM_NODES"};
  std::vector<std::pair<std::string, std::string>> before_;
};

TEST_F(Config, NothingSetIsTheDefault) {
  const Environment environment = read_environment();
  EXPECT_EQ(environment.dispatch_dtype, DispatchDtype::kAuto);
  EXPECT_EQ(environment.peer_timeout.count(), 10'000);
  EXPECT_FALSE(read_job_place().has_value());
}

TEST_F(Config, TheTimeoutHasItsLimits) {
  for (const auto& [text, ms] : {std::pair{"1", 1}, {"3600000", 3'600'000}}) {
    set("SLUICE_TIMEOUT_MS", text);
    EXPECT_EQ(read_environment().peer_timeout.count(), ms);
  }
  for (const char* text : {"0", "3600001", "-5", "12x", "", " 7", "99999999999999"}) {
    set("SLUICE_TIMEOUT_MS", text);
    EXPECT_THAT(refusal(read_environment),
                HasSubstr(std::string("SLUICE_TIMEOUT_MS='") + text + "'"));
  }
}

TEST_F(Config, AnUnknownWireIsRefusedByName) {
  set("SLUICE_DISPATCH_DTYPE", "fp4");
  const std::string text = refusal(read_environment);
  EXPECT_THAT(text, HasSubstr("SLUICE_DISPATCH_DTYPE"));
  EXPECT_THAT(text, HasSubstr("fp4"));
}

TEST_F(Config, EveryLauncherIsUnderstood) {
  struct Case {
    std::vector<std::pair<const char*, const char*>> variables;
    int on_host;
  };
  const Case cases[] = {
      {{{"SLUICE_RANK", "2"}, {"SLUICE_WORLD_SIZE", "4"}, {"SLUICE_JOB", "a"}}, 4},
      {{{"RANK", "2"}, {"WORLD_SIZE", "4"}, {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_ADDR", "h"}}, 2},
      {{{"OMPI_COMM_WORLD_RANK", "2"},
        {"OMPI_COMM_WORLD_SIZE", "4"},
        {"OMPI_COMM_WORLD_LOCAL_SIZE", "1"},
        {"PMIX_NAMESPACE", "n"}},
       1},
      {{{"SLURM_PROCID", "2"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "9"}}, 4},
  };
  for (const Case& c : cases) {
    for (const auto& [name, value] : c.variables) set(name, value);
    const auto place = read_job_place();
    ASSERT_TRUE(place.has_value()) << c.variables[0].first;
    EXPECT_EQ(place->rank, 2);
    EXPECT_EQ(place->num_ranks, 4);
    EXPECT_EQ(place->num_ranks_on_host, c.on_host);
    EXPECT_EQ(place->secret, place->job) << "without SLUICE_SECRET";
    for (const auto& [name, value] : c.variables) unsetenv(name);
  }
}

TEST_F(Config, JobsOfOneLauncherHaveDifferentNames) {
  set("RANK", "0"), set("WORLD_SIZE", "1"), set("MASTER_ADDR", "host");
  set("MASTER_PORT", "29500");
  const std::string first = read_job_place()->job;
  set("MASTER_PORT", "29501");
  EXPECT_NE(read_job_place()->job, first);
  set("SLUICE_SECRET", "hush");
  EXPECT_EQ(read_job_place()->secret, "hush");
}

TEST_F(Config, OfSeveralHostsAnEvenShareIsHere) {
  set("SLURM_PROCID", "2"), set("SLURM_NTASKS", "8"), set("SLURM_JOB_ID", "9");
  set("SLURM_STEP_NUM_NODES", "2");
  EXPECT_EQ(read_job_place()->num_ranks_on_host, 4);
  set("SLURM_STEP_NUM_NODES", "9");
  EXPECT_THAT(refusal(read_job_place), HasSubstr("SLURM_STEP_NUM_NODES='9'"));
}

TEST_F(Config, WhereHostsMeetIsSaidOrFollowsTorchrunsPort) {
  set("RANK", "0"), set("WORLD_SIZE", "2"), set("LOCAL_WORLD_SIZE", "1");
  set("MASTER_ADDR", "node1");
  EXPECT_EQ(read_job_place()->meeting, "");
  EXPECT_FALSE(read_job_place()->has_own_secret);
  set("MASTER_PORT", "29500"), set("SLUICE_SECRET", "hush");
  EXPECT_EQ(read_job_place()->meeting, "node1:29501");
  EXPECT_TRUE(read_job_place()->has_own_secret);
  set("MASTER_ADDR", "fe80::1");
  EXPECT_EQ(read_job_place()->meeting, "[fe80::1]:29501");
  set("SLUICE_MEETING", "node7:1234");
  EXPECT_EQ(read_job_place()->meeting, "node7:1234");
  unsetenv("SLUICE_MEETING"), set("MASTER_PORT", "65535");
  EXPECT_THAT(refusal(read_job_place),
              HasSubstr("MASTER_PORT='65535' is not a whole number in [1, 65534]"));
  set("LOCAL_WORLD_SIZE", "2");  // One host needs no place.
  EXPECT_EQ(read_job_place()->meeting, "");
}

TEST_F(Config, AHostIsNamedAsNcclNamesIt) {
  const std::string here = host_id();
  EXPECT_FALSE(here.empty());
  EXPECT_EQ(host_id(), here);
  set("NCCL_HOSTID", "half of it");
  EXPECT_EQ(host_id(), "half of it");
}

TEST_F(Config, ARankOutsideItsJobIsRefused) {
  set("SLUICE_RANK", "4"), set("SLUICE_WORLD_SIZE", "4"), set("SLUICE_JOB", "a");
  EXPECT_THAT(refusal(read_job_place), HasSubstr("SLUICE_RANK='4'"));
  set("SLUICE_RANK", "3"), set("SLUICE_WORLD_SIZE", "many");
  EXPECT_THAT(refusal(read_job_place), HasSubstr("SLUICE_WORLD_SIZE='many'"));
  set("SLUICE_WORLD_SIZE", "4"), unsetenv("SLUICE_JOB");
  EXPECT_THAT(refusal(read_job_place), HasSubstr("SLUICE_JOB"));
}

}  // namespace
}  // namespace sluice
