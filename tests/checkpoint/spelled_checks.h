// spelled_checks.h - what every variant of SpelledFiles must do: load the same weights, or be
// refused in words that name the fault.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "expect_error.h"
#include "sluice/checkpoint.h"
#include "sluice/quant.h"
#include "spelled_files.h"
#include "temp_dir.h"

namespace sluice::testing {

inline constexpr Storage kStorages[] = {Storage::kW4afp8,         Storage::kW4afp8U8,
                                        Storage::kW4afp8U8Offset, Storage::kWords,
                                        Storage::kBytesOffset,    Storage::kBytesSigned};

inline constexpr auto kUnsupported = ErrorCode::kUnsupported;
inline constexpr auto kCorrupt = ErrorCode::kCorruptFile;

inline float spelled_scale_at(const QuantMatrix& m, std::int64_t i) {
  return m.scales.dtype == DType::kFloat32 ? m.scales.as<float>()[i]
                                           : bf16_to_float(m.scales.as<std::uint16_t>()[i]);
}

/// Every code and scale of what is loaded against the definition.
inline void expect_weights(const Checkpoint& checkpoint) {
  const ExpertWeights weights =
      checkpoint.load_experts(SpelledFiles::kLayer, 0, SpelledFiles::kNumExperts);
  for (int e = 0; e < SpelledFiles::kNumExperts; ++e) {
    const Expert& expert = weights.experts[static_cast<std::size_t>(e)];
    const QuantMatrix* const matrices[] = {&expert.gate, &expert.up, &expert.down};
    for (int m = 0; m < 3; ++m) {
      const QuantMatrix& matrix = *matrices[m];
      ASSERT_EQ(matrix.n(), m == 2 ? 256 : 128);
      ASSERT_EQ(matrix.k(), m == 2 ? 128 : 256);
      for (int row = 0; row < matrix.n(); ++row) {
        for (int column = 0; column < matrix.k(); ++column) {
          const int byte = matrix.codes.as<std::uint8_t>()[row * matrix.k() / 2 + column / 2];
          const int nibble = column % 2 ? byte >> 4 : byte & 15;
          ASSERT_EQ(nibble >= 8 ? nibble - 16 : nibble, SpelledFiles::code(e, m, row, column));
          const int group = column / 128;
          ASSERT_EQ(spelled_scale_at(matrix, row * matrix.k() / 128 + group),
                    SpelledFiles::scale(e, m, row, group));
        }
      }
    }
  }
}

inline void expect_loads(const SpelledFiles& files, std::size_t num_warnings = 0,
                         const std::string& warning = {}) {
  const TempDir dir;
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  expect_weights(checkpoint);
  std::vector<std::string> texts;
  for (const auto& w : checkpoint.warnings()) texts.push_back(w.tensor + ": " + w.text);
  EXPECT_EQ(texts.size(), num_warnings) << ::testing::PrintToString(texts);
  if (num_warnings > 0) {
    EXPECT_THAT(texts, ::testing::Contains(::testing::HasSubstr(warning)));
  }
}

inline void expect_refused(const SpelledFiles& files, ErrorCode code,
                           const std::vector<std::string>& parts) {
  const TempDir dir;
  files.write(dir.path());
  expect_error(code, parts, [&] {
    (void)Checkpoint::open(dir.path()).load_experts(SpelledFiles::kLayer, 0, 2);
  });
}

struct Case {
  const char* what;
  Spelling spelling;
  std::function<void(SpelledFiles&)> spoil;
  ErrorCode code;
  std::vector<std::string> parts;
};

inline void expect_cases(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    SpelledFiles files(c.spelling);
    c.spoil(files);
    expect_refused(files, c.code, c.parts);
  }
}

}  // namespace sluice::testing
