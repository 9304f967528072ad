// disagreement.h - ranks whose configurations differ: all fail, by name.
#pragma once

#include <gmock/gmock.h>

#include <exception>
#include <vector>

#include "multirank/run_ranks.h"

namespace sluice::testing {

/// Every rank has failed, and each names rank 1 and `field`, in which it differs from the others.
inline void expect_disagreement(const std::vector<std::exception_ptr>& failures,
                                const char* field) {
  for (const auto& f : failures) {
    const auto failure = describe(f);
    ASSERT_TRUE(failure) << field;
    EXPECT_EQ(failure->code, ErrorCode::kTransport) << field;
    EXPECT_THAT(failure->text, ::testing::HasSubstr(field));
    EXPECT_THAT(failure->text, ::testing::HasSubstr("rank 1"));
    EXPECT_THAT(failure->text, ::testing::Not(::testing::HasSubstr("rank 2")));
  }
}

}  // namespace sluice::testing
