// How many CTAs a dispatch takes and what each has, without a GPU.
#include <gtest/gtest.h>

#include "exchange/cuda/exchange_kernels.h"
#include "exchange/cuda/split.h"

namespace sluice {
namespace {

TEST(DispatchSplitTest, TokensPartsAndCtasFitTogether) {
  for (const int max_ctas : {1, 2, 16, 66, 132}) {
    for (const int hidden : {128, 384, 2880 / 128 * 128, 7168}) {
      for (const WireFormat wire :
           {WireFormat::kBf16, WireFormat::kE4m3Group, WireFormat::kE4m3Token}) {
        for (const std::int64_t tokens : {0, 1, 2, 15, 16, 17, 65, 66, 67, 128, 132, 133, 4096}) {
          SCOPED_TRACE(::testing::Message()
                       << max_ctas << " CTAs, hidden " << hidden << ", " << tokens
                       << " tokens, wire " << static_cast<int>(wire));
          const DispatchSplit split = split_dispatch(tokens, hidden, wire, max_ctas);
          ASSERT_GE(split.num_ctas, 1);
          ASSERT_LE(split.num_ctas, max_ctas);
          ASSERT_EQ(split.num_ctas % split.parts, 0);
          ASSERT_GE(split.chunk_tokens, 1);
          if (split.parts == 1) continue;
          ASSERT_EQ(split.num_ctas, tokens * split.parts) << "each CTA has one token";
          ASSERT_LE(split.parts * kActivationGroup, hidden) << "each CTA has a group";
          ASSERT_NE(wire, WireFormat::kE4m3Token) << "its scale needs the whole token";
        }
      }
    }
  }
}

TEST(DispatchSplitTest, FewTokensAreSpreadOverTheDevice) {
  EXPECT_EQ(split_dispatch(1, 7168, WireFormat::kE4m3Group, 132).num_ctas, 8);
  EXPECT_EQ(split_dispatch(16, 7168, WireFormat::kE4m3Group, 132).num_ctas, 128);
  EXPECT_EQ(split_dispatch(128, 7168, WireFormat::kE4m3Group, 132).parts, 1);
  EXPECT_EQ(split_dispatch(4096, 7168, WireFormat::kE4m3Group, 132).chunk_tokens, 4);
}

}  // namespace
}  // namespace sluice
