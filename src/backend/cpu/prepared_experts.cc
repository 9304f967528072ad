#include "backend/cpu/prepared_experts.h"

#include <algorithm>
#include <cstring>

#include "backend/check_experts.h"
#include "core/fail.h"
#include "core/threads.h"

namespace sluice::cpu {
namespace {

/// w + 8 in every nibble: the sign bit of a two's complement nibble flips.
constexpr std::uint32_t kFlipSigns = 0x88888888u;

/// Digits and repacking below are of int4.
void check_format(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return;
  }
  fail(ErrorCode::kUnsupported, "the CPU backend has no weight format {}",
       static_cast<int>(format));
}

void check_kind(const ActivationFn& fn) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
    case ActivationKind::kSwigluLimit:
    case ActivationKind::kSwigluOai:
    case ActivationKind::kSitu:
      check_activation(fn);
      return;
  }
  fail(ErrorCode::kUnsupported, "the CPU backend has no activation {}", static_cast<int>(fn.kind));
}

PreparedMatrix describe(const QuantMatrix& m) {
  PreparedMatrix out;
  out.scales_are_bf16 = m.scales.dtype == DType::kBFloat16;
  out.group_size = m.group_size;
  out.n = m.n();
  out.k = m.k();
  return out;
}

/// Rows [16 * block, 16 * block + 16) of codes, four bytes of a row at a time.
void repack_codes(const QuantMatrix& m, std::int64_t block, std::uint8_t* out) {
  const std::int64_t row_bytes = m.k() / 2;
  const std::uint8_t* in = m.codes.as<std::uint8_t>() + block * kBlockN * row_bytes;
  for (std::int64_t line = 0; line < m.k() / kLineK; ++line) {
    for (int lane = 0; lane < kBlockN; ++lane) {
      std::uint32_t word;
      std::memcpy(&word, in + lane * row_bytes + line * 4, 4);
      word ^= kFlipSigns;
      std::memcpy(out + line * kLineBytes + lane * 4, &word, 4);
    }
  }
}

template <class T>
void repack_scales(const QuantMatrix& m, std::int64_t block, T* out) {
  const std::int64_t groups = m.k() / m.group_size;
  const T* in = m.scales.as<T>() + block * kBlockN * groups;
  for (std::int64_t g = 0; g < groups; ++g) {
    for (int lane = 0; lane < kBlockN; ++lane) out[g * kBlockN + lane] = in[lane * groups + g];
  }
}

/// Blocks [first, last) of one matrix into the memory its views point at.
void repack(const QuantMatrix& m, const PreparedMatrix& out, std::int64_t first,
            std::int64_t last) {
  const std::int64_t code_stride = kBlockN * m.k() / 2;
  const std::int64_t scale_stride = kBlockN * (m.k() / m.group_size);
  auto* codes = const_cast<std::uint8_t*>(out.codes);
  for (std::int64_t block = first; block < last; ++block) {
    repack_codes(m, block, codes + block * code_stride);
    if (out.scales_are_bf16) {
      auto* scales = static_cast<std::uint16_t*>(const_cast<void*>(out.scales));
      repack_scales(m, block, scales + block * scale_stride);
    } else {
      auto* scales = static_cast<float*>(const_cast<void*>(out.scales));
      repack_scales(m, block, scales + block * scale_stride);
    }
  }
}

}  // namespace

PreparedCpuExperts::PreparedCpuExperts(const ExpertWeights& weights, ThreadPool& pool)
    : hidden_(weights.geometry.hidden),
      intermediate_(weights.geometry.intermediate),
      activation_(weights.geometry.activation) {
  check_kind(activation_);
  check_argument(hidden_ > 0 && hidden_ % kActivationGroup == 0,
                 "hidden {} is not a multiple of {}", hidden_, int{kActivationGroup});
  check_argument(intermediate_ > 0 && intermediate_ % kActivationGroup == 0,
                 "intermediate {} is not a multiple of {}", intermediate_, int{kActivationGroup});
  for (const Expert& e : weights.experts) {
    for (const QuantMatrix* m : {&e.gate, &e.up, &e.down}) check_format(m->format);
  }
  check_experts(weights);
  std::size_t total = 0;
  for (const Expert& e : weights.experts) {
    experts_.push_back({describe(e.gate), describe(e.up), describe(e.down)});
    for (const PreparedMatrix* m :
         {&experts_.back().gate, &experts_.back().up, &experts_.back().down}) {
      total += m->memory_bytes();
    }
  }
  memory_ = PageBuffer(total, PageBuffer::Pages::kHuge);
  std::size_t offset = 0;
  for (PreparedExpert& e : experts_) {
    for (PreparedMatrix* m : {&e.gate, &e.up, &e.down}) {
      m->codes = reinterpret_cast<const std::uint8_t*>(memory_.data() + offset);
      offset += PreparedMatrix::whole_pages(m->code_bytes());
      m->scales = memory_.data() + offset;
      offset += PreparedMatrix::whole_pages(m->scale_bytes());
    }
  }
  // 128 channels, of which every N is a multiple.
  constexpr std::int64_t kBlocksPerTask = kActivationGroup / kBlockN;
  for (std::size_t i = 0; i < experts_.size(); ++i) {
    const Expert& in = weights.experts[i];
    const PreparedExpert& out = experts_[i];
    const std::int64_t inner = intermediate_ / kActivationGroup;
    pool.for_each_task(2 * inner + hidden_ / kActivationGroup, [&](std::int64_t task, int) {
      const auto repack_task = [&](const QuantMatrix& from, const PreparedMatrix& to) {
        repack(from, to, task * kBlocksPerTask, (task + 1) * kBlocksPerTask);
      };
      if (task < inner) return repack_task(in.gate, out.gate);
      task -= inner;
      if (task < inner) return repack_task(in.up, out.up);
      task -= inner;
      repack_task(in.down, out.down);
    });
    weights.release_pages(static_cast<int>(i));
  }
}

}  // namespace sluice::cpu
