// token_rows_fixture.h - holds a backend's gather_tokens() and sum_entries() against the plainest
// code, byte by byte.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "backend/ops.h"
#include "core/counter_rng.h"
#include "sluice/quant.h"
#include "support/scalar_backend.h"

namespace sluice::testing {

/// A call's tokens and entries. Some numbers are no expert here, and some values are unusual.
struct TokenCase {
  int num_tokens = 0, num_topk = 0;
  int first_expert = 0, num_experts = 0;
  std::int64_t width = 0;
  bool wide_idx = false;
};

class TokenRowsCheck {
 public:
  TokenRowsCheck(Backend& backend, const TokenCase& c) : ops_(&ops(backend)), case_(c) {
    const auto entries = static_cast<std::size_t>(c.num_tokens * c.num_topk);
    const auto size = static_cast<std::size_t>(c.num_tokens * c.width);
    const CounterRng rng(17, 1);
    std::uint64_t next = 0;
    for (std::size_t i = 0; i < entries; ++i) {
      const double u = rng.uniform(next++);
      const std::int64_t id =
          c.first_expert - 2 + static_cast<std::int64_t>(u * (c.num_experts + 4));
      idx_.push_back(i % 11 == 5 ? std::numeric_limits<std::int32_t>::max() : id);
      weights_.push_back(static_cast<float>(rng.normal(next++)));
    }
    for (std::size_t i = 0; i < size; ++i) {
      x_.push_back(bf16_from_float(static_cast<float>(rng.normal(next++) * std::exp2(i % 9))));
    }
    // A group of zeros, one with a NaN and one with an infinity.
    if (size >= 3 * kActivationGroup) {
      std::fill_n(x_.begin(), kActivationGroup, 0);
      x_[kActivationGroup + 3] = 0x7fc0, x_[2 * kActivationGroup + 100] = 0xff80;
    }
  }

  /// Every chain of casts, of bf16 tokens and of e4m3 ones.
  void run() {
    for (const Cast first : {Cast::kGroup, Cast::kGroupPow2, Cast::kStatic, Cast::kStaticPow2,
                             Cast::kToken, Cast::kNone}) {
      for (const Cast second : {Cast::kNone, Cast::kStatic}) {
        if ((has_static_scale(first) || first == Cast::kToken) && second != Cast::kNone) continue;
        for (const Cast sent : {Cast::kGroup, Cast::kStatic, Cast::kToken}) {
          // Only tokens that are e4m3 already come in several kinds, and only one can be moved.
          if (sent != Cast::kGroup && (first != Cast::kNone || second != Cast::kNone)) continue;
          SCOPED_TRACE(::testing::Message() << to_string(first) << ", then " << to_string(second)
                                            << ", sent by " << to_string(sent));
          compare(first, second, sent);
        }
      }
    }
  }

 private:
  struct Outcome {
    std::vector<std::int32_t> row_of, count;
    std::vector<std::int64_t> begin;
    std::vector<std::uint8_t> codes;
    std::vector<float> scale;
    std::vector<std::uint16_t> y;
  };

  void compare(Cast first, Cast second, Cast sent) {
    ScalarBackend scalar;
    const Outcome expected = outcome(scalar, first, second, sent);
    const Outcome actual = outcome(*ops_, first, second, sent);
    EXPECT_EQ(actual.row_of, expected.row_of);
    EXPECT_EQ(actual.count, expected.count);
    EXPECT_EQ(actual.begin, expected.begin);
    EXPECT_EQ(actual.codes, expected.codes);
    ASSERT_EQ(actual.scale.size(), expected.scale.size());
    EXPECT_EQ(std::memcmp(actual.scale.data(), expected.scale.data(), actual.scale.size() * 4), 0);
    EXPECT_EQ(actual.y, expected.y);
  }

  /// Host memory as memory of the backend.
  template <class T>
  static std::unique_ptr<DeviceBuffer> upload(BackendOps& backend, const std::vector<T>& host) {
    auto buffer = backend.allocate(std::max<std::size_t>(16, host.size() * sizeof(T)));
    backend.copy_from_host(buffer->data(), host.data(), host.size() * sizeof(T), backend.stream());
    return buffer;
  }
  template <class T>
  static std::vector<T> download(BackendOps& backend, const DeviceBuffer& buffer,
                                 std::size_t count) {
    std::vector<T> host(count);
    backend.copy_to_host(host.data(), buffer.data(), count * sizeof(T), backend.stream());
    return host;
  }
  template <class T>
  static T* as(const std::unique_ptr<DeviceBuffer>& buffer) {
    return reinterpret_cast<T*>(buffer->data());
  }

  /// What `backend` makes of the case. Rows of codes lie twice as far apart as they are long.
  Outcome outcome(BackendOps& backend, Cast first, Cast second, Cast sent) {
    const TokenCase& c = case_;
    const auto entries = idx_.size(), experts = static_cast<std::size_t>(c.num_experts);
    const auto width = static_cast<std::size_t>(c.width), groups = width / kActivationGroup;
    const std::vector<std::int32_t> narrow(idx_.begin(), idx_.end());
    const auto idx = c.wide_idx ? upload(backend, idx_) : upload(backend, narrow);
    const auto row_of = upload(backend, std::vector<std::int32_t>(entries, -77));
    const auto begin = upload(backend, std::vector<std::int64_t>(experts, -77));
    const auto count = upload(backend, std::vector<std::int32_t>(experts, -77));
    const auto codes = upload(backend, std::vector<std::uint8_t>(entries * width * 2, 0x55));
    const auto scale = upload(backend, std::vector<float>(entries * groups, -7.0f));
    const bool is_coded = first == Cast::kNone;
    const Cast last = second != Cast::kNone ? second : is_coded ? sent : first;
    const bool has_own = scales_per_row(last, c.width) > 0;
    const bool has_scales = scales_per_row(sent, c.width) > 0;
    const auto x = upload(backend, x_);
    std::vector<std::uint8_t> given(x_.size());
    std::vector<float> given_scale;
    for (std::size_t i = 0; i < given.size(); ++i) given[i] = static_cast<std::uint8_t>(x_[i] >> 3);
    for (std::size_t i = 0; i < given.size() / kActivationGroup; ++i) {
      given_scale.push_back(static_cast<float>(i % 13 + 1) * 0x1p-7f);
    }
    const auto coded = upload(backend, given), coded_scale = upload(backend, given_scale);
    const TokenRows tokens{.x = is_coded ? nullptr : as<std::uint16_t>(x),
                           .coded = {.codes = as<std::uint8_t>(coded),
                                     .scale = has_scales ? as<float>(coded_scale) : nullptr,
                                     .static_scale = has_scales ? 0 : 0.03f,
                                     .width = c.width,
                                     .scale_per_row = sent == Cast::kToken},
                           .first = first,
                           .second = second};
    const EntryRows rows{.topk_idx = idx->data(),
                         .wide_idx = c.wide_idx,
                         .num_tokens = c.num_tokens,
                         .num_topk = c.num_topk,
                         .first_expert = c.first_expert,
                         .num_experts = c.num_experts,
                         .row_of = as<std::int32_t>(row_of),
                         .begin = as<std::int64_t>(begin),
                         .count = as<std::int32_t>(count)};
    backend.gather_tokens(tokens, rows,
                          {.codes = as<std::uint8_t>(codes),
                           .scale = has_own ? as<float>(scale) : nullptr,
                           .static_scale = has_own ? 0 : 0.03f,
                           .width = c.width,
                           .stride = 2 * c.width,
                           .scale_per_row = last == Cast::kToken},
                          backend.stream());
    Outcome out{.row_of = download<std::int32_t>(backend, *row_of, entries),
                .count = download<std::int32_t>(backend, *count, experts),
                .begin = download<std::int64_t>(backend, *begin, experts),
                .codes = download<std::uint8_t>(backend, *codes, entries * width * 2),
                .scale = download<float>(backend, *scale, entries * groups),
                .y = {}};
    // Rows of the sum: the tokens' own, in another order, as often as there are entries.
    std::vector<std::uint16_t> values;
    for (std::size_t r = 0; r < entries; ++r) {
      const std::size_t token = r * 7 % static_cast<std::size_t>(c.num_tokens);
      values.insert(values.end(), x_.begin() + static_cast<long>(token * width),
                    x_.begin() + static_cast<long>((token + 1) * width));
    }
    for (std::uint16_t& v : values) v = (v & 0x7f80) == 0x7f80 ? 0 : v;  // Finite sums.
    const auto from = upload(backend, values), weights = upload(backend, weights_);
    const auto y = upload(backend, std::vector<std::uint16_t>(x_.size(), 0x7fc1));
    backend.sum_entries({.rows = as<std::uint16_t>(from),
                         .row_of = as<std::int32_t>(row_of),
                         .weights = as<float>(weights),
                         .num_tokens = c.num_tokens,
                         .num_topk = c.num_topk,
                         .width = c.width,
                         .factor = 2.5f,
                         .y = as<std::uint16_t>(y)},
                        backend.stream());
    out.y = download<std::uint16_t>(backend, *y, x_.size());
    return out;
  }

  BackendOps* ops_;
  TokenCase case_;
  std::vector<std::int64_t> idx_;
  std::vector<float> weights_;
  std::vector<std::uint16_t> x_;
};

inline void check_token_rows(Backend& backend, const TokenCase& c) {
  SCOPED_TRACE(::testing::Message()
               << c.num_tokens << " tokens, top-" << c.num_topk << ", experts " << c.first_expert
               << " + " << c.num_experts << ", width " << c.width);
  TokenRowsCheck(backend, c).run();
}

}  // namespace sluice::testing
