// A line through times, the built-in machines, and machines in files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/error.h"
#include "sluice/lab/network_model.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(LineFit, FindsTheLine) {
  std::vector<SizeTime> points;
  for (const double bytes : {1e3, 1e5, 1e6, 1e7}) points.push_back({bytes, 12 + bytes / 50e3});
  const LineFit fit = fit_line(points);
  EXPECT_NEAR(fit.fixed_us, 12, 1e-9);
  EXPECT_NEAR(fit.gbytes_per_s, 50, 1e-9);
  EXPECT_NEAR(fit.rms_error, 0, 1e-12);
  // One time 10 % too long: the line stays near, and says by how much it misses.
  points[1].us *= 1.1;
  const LineFit off = fit_line(points);
  EXPECT_NEAR(off.fixed_us, 12, 1);
  EXPECT_NEAR(off.gbytes_per_s, 50, 3);
  EXPECT_GT(off.rms_error, 0.02);
  EXPECT_GE(std::fabs(off.worst_error), off.rms_error);
  // A line that would begin below zero goes through it.
  EXPECT_EQ(fit_line(std::vector<SizeTime>{{1e6, 10}, {2e6, 30}}).fixed_us, 0);
  const auto refused = [](std::vector<SizeTime> some, const char* message) {
    EXPECT_THAT([&] { (void)fit_line(some); }, ThrowsMessage<Error>(HasSubstr(message)));
  };
  refused({{1e6, 10}}, "a line needs two sizes");
  refused({{1e6, 10}, {1e6, 11}}, "a line needs two sizes");
  refused({{1e6, 10}, {2e6, 9}}, "do not grow with the bytes");
  refused({{0, 10}, {2e6, 9}}, "both have to be positive");
}

TEST(Machine, EveryNumberOfAPresetHasASource) {
  for (const std::string& name : machine_names()) {
    const MachineModel machine = machine_preset(name);
    EXPECT_FALSE(machine.about.empty());
    for (const MachineParameter& p : machine_parameters()) {
      const std::string source = machine_source(name, p.name);
      const bool is_default = machine.*p.value == MachineModel{}.*p.value;
      if (machine.rules == ExchangeRules::kSluice && !is_default) {
        EXPECT_FALSE(source.empty()) << name << ", " << p.name;
      }
      // 0: the machine has no such rate.
      EXPECT_TRUE(machine.*p.value == 0 || machine.*p.value >= p.low) << name << ", " << p.name;
      EXPECT_LE(machine.*p.value, p.high) << name << ", " << p.name;
    }
  }
  EXPECT_THAT([] { (void)machine_preset("h300"); },
              ThrowsMessage<Error>(HasSubstr("machine 'h300' is none of: h200-ib400, ")));
  EXPECT_THAT(
      [] { (void)machine_source("h200-ib400", "speed"); },
      ThrowsMessage<Error>(HasSubstr("parameter 'speed' is none of: network_gbytes_per_s")));
}

TEST(Machine, IsReadFromAFile) {
  const std::string path = ::testing::TempDir() + "cluster.json";
  const auto write = [&](const std::string& text) { std::ofstream(path) << text; };
  write(R"({"base": "h200-ib400", "parameters": {"network_gbytes_per_s": 22.5}, "command": "x"})");
  const MachineModel machine = read_machine(path);
  EXPECT_EQ(machine.name, "cluster");
  EXPECT_EQ(machine.network_gbytes_per_s, 22.5);
  EXPECT_EQ(machine.pull_gbytes_per_s, 331);
  const auto refused = [&](const std::string& text, const char* message) {
    write(text);
    EXPECT_THAT([&] { (void)read_machine(path); }, ThrowsMessage<Error>(HasSubstr(message)));
  };
  refused("{", "is no JSON object");
  refused("[]", "is no JSON object");
  refused(R"({"base": "h200-ib400"})", "has no object \"parameters\"");
  refused(R"({"parameters": {}})", "has no \"base\"");
  refused(R"({"base": "x", "parameters": {}})", "machine 'x' is none of");
  refused(R"({"base": "h200-ib400", "parameters": {"speed": 1}})", "parameter 'speed' is none of");
  refused(R"({"base": "h200-ib400", "parameters": {"overlap": 2}})", "overlap 2 is not in 0 .. 1");
  refused(R"({"base": "h200-ib400", "parameters": {"overlap": "1"}})", "'overlap' is no number");
  EXPECT_THAT([&] { (void)read_machine(path + ".none"); },
              ThrowsMessage<Error>(HasSubstr("cannot open")));
  EXPECT_THAT([] { (void)read_machine(::testing::TempDir()); },
              ThrowsMessage<Error>(HasSubstr("not a regular file")));
}

TEST(Machine, HasNoRateNearZero) {
  int rates = 0;
  for (const MachineParameter& p : machine_parameters()) {
    if (std::string_view(p.unit) != "GB/s") continue;
    ++rates;
    MachineModel machine;
    EXPECT_THAT(
        [&] { set_parameter(machine, p.name, 0.0009); },
        ThrowsMessage<Error>(HasSubstr(std::string(p.name) + " 0.0009 is not in 0.001 .. ")));
    set_parameter(machine, p.name, 0.001);
    EXPECT_EQ(machine.*p.value, 0.001);
  }
  EXPECT_EQ(rates, 5);
}

}  // namespace
}  // namespace sluice
