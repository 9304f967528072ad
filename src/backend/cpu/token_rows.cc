// Rows of tokens, and tokens of rows: what a local call does around the experts.
#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/row_kernels.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice::cpu {
namespace {

/// Local expert of each entry, or -1.
std::vector<std::int32_t> local_experts(const EntryRows& entries) {
  const std::int64_t count = entries.num_tokens * entries.num_topk;
  std::vector<std::int32_t> local(static_cast<std::size_t>(count), -1);
  const auto fill = [&](const auto* idx) {
    for (std::int64_t i = 0; i < count; ++i) {
      // First compared, then subtracted: the difference of any two int64 need not be one.
      const std::int64_t id = idx[i], first = entries.first_expert;
      if (id < first || id >= first + entries.num_experts) continue;
      local[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(id - first);
    }
  };
  if (entries.wide_idx) {
    fill(static_cast<const std::int64_t*>(entries.topk_idx));
  } else {
    fill(static_cast<const std::int32_t*>(entries.topk_idx));
  }
  return local;
}

/// Counting sort of the entries by expert.
void give_rows(const EntryRows& entries) {
  const std::vector<std::int32_t> local = local_experts(entries);
  std::fill_n(entries.count, entries.num_experts, 0);
  for (const std::int32_t e : local) {
    if (e >= 0) ++entries.count[e];
  }
  std::vector<std::int32_t> next(static_cast<std::size_t>(entries.num_experts));
  std::int32_t total = 0;
  for (int e = 0; e < entries.num_experts; ++e) {
    entries.begin[e] = next[static_cast<std::size_t>(e)] = total;
    total += entries.count[e];
  }
  for (std::size_t i = 0; i < local.size(); ++i) {
    entries.row_of[i] = local[i] < 0 ? -1 : next[static_cast<std::size_t>(local[i])]++;
  }
}

/// A token's codes and scales between two casts.
struct FirstCast {
  std::vector<std::uint8_t> codes;
  std::vector<float> scale;
};

GroupScale scale_kind(Cast cast) {
  switch (cast) {
    case Cast::kGroup:
      return GroupScale::kAmax;
    case Cast::kGroupPow2:
      return GroupScale::kPow2;
    case Cast::kToken:
      return GroupScale::kToken;
    case Cast::kNone:
    case Cast::kStatic:
    case Cast::kStaticPow2:
      break;
  }
  fail(ErrorCode::kInternal, "cast {} gives a row no scales of its own", to_string(cast));
}

/// Token `t` into row `row` of `out`.
void cast_token(const TokenRows& tokens, std::int64_t t, const Fp8Rows& out, std::int64_t row,
                FirstCast& between) {
  const std::int64_t width = out.width, scales = out.num_scales();
  std::uint8_t* const codes = out.row(row);
  float* const scale = out.scale != nullptr ? out.scale + row * scales : nullptr;
  const bool moves = tokens.second != Cast::kNone;
  if (tokens.x == nullptr) {
    const float* const given = tokens.coded.scale != nullptr
                                   ? tokens.coded.scale + t * tokens.coded.num_scales()
                                   : nullptr;
    if (moves) return requantize_row(tokens.coded.row(t), given, width, out.static_scale, codes);
    std::memcpy(codes, tokens.coded.row(t), static_cast<std::size_t>(width));
    if (scale != nullptr) std::copy_n(given, scales, scale);
    return;
  }
  const std::uint16_t* const x = tokens.x + t * width;
  if (has_static_scale(tokens.first)) {
    return quantize_row_static(x, width, out.static_scale, codes);
  }
  const GroupScale kind = scale_kind(tokens.first);
  if (!moves) return quantize_row(x, width, kind, codes, scale);
  quantize_row(x, width, kind, between.codes.data(), between.scale.data());
  requantize_row(between.codes.data(), between.scale.data(), width, out.static_scale, codes);
}

void check_casts(const TokenRows& tokens, const Fp8Rows& out) {
  const Cast last = tokens.second != Cast::kNone ? tokens.second : tokens.first;
  SLUICE_ASSERT(out.width > 0 && out.width % kGroup == 0);
  SLUICE_ASSERT((tokens.x == nullptr) == (tokens.first == Cast::kNone));
  SLUICE_ASSERT(tokens.second == Cast::kNone || has_static_scale(tokens.second));
  if (last == Cast::kNone) return;
  SLUICE_ASSERT((scales_per_row(last, out.width) > 0) == (out.scale != nullptr));
  SLUICE_ASSERT((last == Cast::kToken) == out.scale_per_row);
}

}  // namespace

void CpuBackend::gather_tokens(const TokenRows& tokens, const EntryRows& entries,
                               const Fp8Rows& out, Stream) {
  check_casts(tokens, out);
  give_rows(entries);
  const std::int64_t groups = out.width / kGroup, threads = pool_.num_threads();
  pool_.run([&](int thread) {
    FirstCast between{std::vector<std::uint8_t>(static_cast<std::size_t>(out.width)),
                      std::vector<float>(static_cast<std::size_t>(groups))};
    const std::int64_t last = entries.num_tokens * (thread + 1) / threads;
    for (std::int64_t t = entries.num_tokens * thread / threads; t < last; ++t) {
      std::int64_t first_row = -1;
      for (std::int64_t i = t * entries.num_topk; i < (t + 1) * entries.num_topk; ++i) {
        const std::int64_t row = entries.row_of[i];
        if (row < 0) continue;
        if (first_row < 0) {
          cast_token(tokens, t, out, first_row = row, between);
          continue;
        }
        std::memcpy(out.row(row), out.row(first_row), static_cast<std::size_t>(out.width));
        if (out.scale == nullptr) continue;
        const std::int64_t scales = out.num_scales();
        std::copy_n(out.scale + first_row * scales, scales, out.scale + row * scales);
      }
    }
  });
}

void CpuBackend::sum_entries(const EntrySums& s, Stream) {
  const auto width = static_cast<std::size_t>(s.width);
  const std::int64_t threads = pool_.num_threads();
  pool_.run([&](int thread) {
    std::vector<float> sum(width);
    const std::int64_t last = s.num_tokens * (thread + 1) / threads;
    for (std::int64_t t = s.num_tokens * thread / threads; t < last; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (std::int64_t i = t * s.num_topk; i < (t + 1) * s.num_topk; ++i) {
        if (s.row_of[i] < 0) continue;
        const float weight = s.weights[i];
        const std::uint16_t* const row = s.rows + s.row_of[i] * s.width;
        for (std::size_t c = 0; c < width; ++c) sum[c] += weight * bf16_to_float(row[c]);
      }
      std::uint16_t* const y = s.y + t * s.width;
      for (std::size_t c = 0; c < width; ++c) y[c] = bf16_from_float(sum[c] * s.factor);
    }
  });
}

}  // namespace sluice::cpu
