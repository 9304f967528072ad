// Files of rows and placements: what is written is read; everything else is refused by name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "checkpoint/temp_dir.h"
#include "sluice/error.h"
#include "sluice/placement_files.h"

namespace sluice {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class PlacementFiles : public ::testing::Test {
 protected:
  std::filesystem::path write(const std::string& text) {
    std::ofstream(path_, std::ios::binary) << text;
    return path_;
  }
  std::string read() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  /// What reading `text` throws.
  template <class Read>
  std::string refusal(const Read& read, const std::string& text, ErrorCode code) {
    try {
      (void)read(write(text));
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << text;
      EXPECT_THAT(error.what(), HasSubstr(path_.string()));
      return error.what();
    }
    return "not refused: " + text;
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_.path() / "file.json";
};

/// `text` with its one `from` replaced.
std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

constexpr const char* kRows = R"({
  "format": "sluice-expert-rows",
  "version": 1,
  "num_experts": 3,
  "layers": [
    {"layer": 3, "steps": [[1, 2, 3], [0, 0, 9]]},
    {"layer": 4, "steps": [[4, 5, 6], [7, 8, 9]]}
  ]
}
)";

constexpr const char* kPlacements = R"({
  "format": "sluice-placement",
  "version": 1,
  "num_experts": 3,
  "num_ranks": 2,
  "num_slots": 4,
  "layers": [
    {"layer": 3, "slot_experts": [0, 1, 2, null]},
    {"layer": 7, "slot_experts": [2, 0, 1, 2]}
  ]
}
)";

TEST_F(PlacementFiles, RowsComeBack) {
  const ExpertRows rows = read_expert_rows(write(kRows));
  ASSERT_EQ(rows.layers.size(), 2u);
  EXPECT_EQ(rows.layers[1].layer, 4);
  EXPECT_EQ(rows.layers[0].sum(), (std::vector<std::int64_t>{1, 2, 12}));
  EXPECT_EQ(rows.layers[0].sum(1), (std::vector<std::int64_t>{0, 0, 9}));
  EXPECT_THROW((void)rows.layers[0].sum(3), Error);
  // 2^53 rows with the nine of the second step are the most that there can be.
  const ExpertRows most =
      read_expert_rows(write(replaced(kRows, "3], [0", "9007199254740980], [0")));
  EXPECT_EQ(most.layers[0].sum()[2], 9007199254740989);
  write_expert_rows(path_, rows);
  EXPECT_EQ(read(), kRows);
}

TEST_F(PlacementFiles, PlacementsComeBack) {
  const std::vector<LayerPlacement> placements = read_placements(write(kPlacements));
  ASSERT_EQ(placements.size(), 2u);
  EXPECT_EQ(placements[0].placement, Placement::create(3, 2, {0, 1, 2, kEmptySlot}));
  EXPECT_EQ(placements[1].layer, 7);
  write_placements(path_, placements);
  EXPECT_EQ(read(), kPlacements);
}

TEST_F(PlacementFiles, EveryPrefixOfAFileIsRefused) {
  for (const std::string text : {kRows, kPlacements}) {
    for (std::size_t size = 0; size + 2 < text.size(); ++size) {
      write(text.substr(0, size));
      if (text == kRows) {
        EXPECT_THROW((void)read_expert_rows(path_), Error) << size;
      } else {
        EXPECT_THROW((void)read_placements(path_), Error) << size;
      }
    }
  }
}

struct Fault {
  const char *from, *to, *expected;
};

TEST_F(PlacementFiles, RowsAreRefusedByName) {
  constexpr Fault kFaults[] = {
      {"\"version\"", "\"versoin\"", "key 'versoin' is unknown here"},
      {"  \"version\": 1,\n", "", "key 'version' is missing"},
      {"\"steps\": [[4", "\"rows\": [[4", "key 'rows' is unknown here"},
      {"{\"layer\": 4, ", "{", "key 'layer' is missing"},
      {"\"num_experts\": 3", "\"num_experts\": 3, \"num_experts\": 3", "occurs twice"},
      {"\"num_experts\": 3", "\"num_experts\": 4", "rows of 3 experts, and num_experts is 4"},
      {"\"num_experts\": 3", "\"num_experts\": 0", "num_experts 0 is not in [1, 65536]"},
      {"\"num_experts\": 3", "\"num_experts\": \"3\"", "num_experts should be a number"},
      {"\"layer\": 4", "\"layer\": 3", "layer 3 is there twice"},
      {", [7, 8, 9]", "", "layer 4 has 1 steps, layer 3 has 2"},
      {"[1, 2, 3]", "[1, -2, 3]", "byte"},
      {"[1, 2, 3]", "[1, 2.5, 3]", "byte"},
      {"[1, 2, 3]", "[1, null, 3]", "rows of an expert should be a number"},
      {"[1, 2, 3]", "[1, 2, 9223372036854775808]", "rows of an expert 9223372036854775808"},
      {"[1, 2, 3]", "[1, 2, 9223372036854775807]", "layer 3: the rows of all steps together"},
      {"[1, 2, 3]", "[1, 2, 9007199254740981]", "are above 2^53 = 9007199254740992"},
      {"]\n}", "]\n} 1", "byte"},
  };
  for (const Fault& fault : kFaults) {
    EXPECT_THAT(
        refusal(read_expert_rows, replaced(kRows, fault.from, fault.to), ErrorCode::kCorruptFile),
        HasSubstr(fault.expected));
  }
  // Sound files of another kind.
  constexpr Fault kOtherKinds[] = {
      {"sluice-expert-rows", "sluice-placement", "format 'sluice-placement'"},
      {"\"format\"", "\"model_type\"", "no file of format 'sluice-expert-rows': key 'model_type'"},
      {"  \"format\": \"sluice-expert-rows\",\n", "", "no key says so"},
  };
  for (const Fault& fault : kOtherKinds) {
    EXPECT_THAT(
        refusal(read_expert_rows, replaced(kRows, fault.from, fault.to), ErrorCode::kUnsupported),
        HasSubstr(fault.expected));
  }
  EXPECT_THAT(refusal(read_expert_rows, replaced(kRows, "\"version\": 1", "\"version\": 2"),
                      ErrorCode::kUnsupported),
              HasSubstr("version 2; this Sluice reads version 1"));
}

TEST_F(PlacementFiles, PlacementsAreRefusedByName) {
  constexpr Fault kFaults[] = {
      {"\"slot_experts\": [0", "\"slots\": [0", "key 'slots' is unknown here"},
      {"  \"num_slots\": 4,\n", "", "key 'num_slots' is missing"},
      {"[0, 1, 2, null]", "[0, 1, 2]", "layer 3: slot_experts has 3 slots, and num_slots is 4"},
      {"[0, 1, 2, null]", "[0, 1, 3, null]", "layer 3:"},
      {"[0, 1, 2, null]", "[0, 1, 1, null]", "layer 3:"},
      {"[0, 1, 2, null]", "[0, 1, -1, null]", "byte"},
      {"[0, 1, 2, null]", "[0, 1, \"2\", null]", "expert of a slot should be a number"},
      {"\"num_ranks\": 2", "\"num_ranks\": 3", "no multiple of 3 ranks"},
      {"\"num_ranks\": 2", "\"num_ranks\": 0", "num_ranks 0 is not in [1, 65536]"},
      {"\"layer\": 7", "\"layer\": 3", "layer 3 is there twice"},
  };
  for (const Fault& fault : kFaults) {
    EXPECT_THAT(refusal(read_placements, replaced(kPlacements, fault.from, fault.to),
                        ErrorCode::kCorruptFile),
                HasSubstr(fault.expected));
  }
}

TEST_F(PlacementFiles, WritersRefuseWhatReadersWould) {
  EXPECT_THROW(write_expert_rows(path_, {}), Error);
  EXPECT_THROW(write_expert_rows(path_, {2, {{.layer = 1, .steps = {{1}}}}}), Error);
  EXPECT_THROW(write_expert_rows(path_, {1, {{.layer = 1, .steps = {{-1}}}}}), Error);
  EXPECT_THROW(write_placements(path_, {}), Error);
  const std::vector<LayerPlacement> differ = {{0, Placement::identity(4, 2)},
                                              {1, Placement::identity(4, 4)}};
  EXPECT_THROW(write_placements(path_, differ), Error);
  EXPECT_FALSE(std::filesystem::exists(path_));
  // What was there before stays.
  const std::vector<int> layers_of[] = {{-1}, {100'001}, {4, 7, 4}};
  const char* const problems[] = {"layer -1 is not in [0, 100000]",
                                  "layer 100001 is not in [0, 100000]", "layer 4 is there twice"};
  write(kPlacements);
  for (std::size_t i = 0; i < std::size(problems); ++i) {
    ExpertRows rows{.num_experts = 1};
    std::vector<LayerPlacement> placements;
    for (const int layer : layers_of[i]) {
      rows.layers.push_back({.layer = layer, .steps = {{1}}});
      placements.push_back({layer, Placement::identity(4, 2)});
    }
    const auto expect_refused = [&](const auto& write_file) {
      try {
        write_file();
        ADD_FAILURE() << "written: " << problems[i];
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        EXPECT_THAT(error.what(), HasSubstr(path_.string() + ": " + problems[i]));
      }
    };
    expect_refused([&] { write_expert_rows(path_, rows); });
    expect_refused([&] { write_placements(path_, placements); });
  }
  EXPECT_EQ(read(), kPlacements);
  write_placements(path_, std::vector<LayerPlacement>{{100'000, Placement::identity(4, 2)}});
  EXPECT_EQ(read_placements(path_).front().layer, 100'000);
  EXPECT_THROW(write_placements(dir_.path() / "none" / "file", std::span(differ).first(1)), Error);
}

}  // namespace
}  // namespace sluice
