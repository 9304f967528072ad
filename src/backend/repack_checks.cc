#include "backend/repack_checks.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>

#include "backend/ops.h"
#include "backend/traits.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr std::array<const char*, 3> kMatrixNames = {"gate", "up", "down"};
constexpr int kMaxExperts = 512;  // Of a kernel's launch.

std::array<const MatrixSource*, 3> matrices_of(const ExpertSource& source) {
  return {&source.gate, &source.up, &source.down};
}

/// Bytes [begin, end) of memory.
struct Extent {
  const std::byte* begin;
  const std::byte* end;
  [[nodiscard]] bool overlaps(const Extent& other) const noexcept {
    return begin < other.end && other.begin < end;
  }
};

struct MatrixShape {
  std::int64_t n, k;
};
MatrixShape shape_of(const RepackFormat& format, std::size_t matrix) {
  const std::int64_t hidden = format.geometry.hidden, inter = format.geometry.intermediate;
  return matrix == 2 ? MatrixShape{hidden, inter} : MatrixShape{inter, hidden};
}

Extent codes_of(const MatrixSource& m, const MatrixShape& s) {
  return {m.codes, m.codes + (s.n - 1) * m.row_bytes + (s.k / 8 - 1) * m.word_bytes + 4};
}
Extent scales_of(const RepackFormat& format, const MatrixSource& m, const MatrixShape& s) {
  const std::int64_t groups = s.k / format.geometry.group_size;
  const std::int64_t last = (s.n - 1) * m.scale_row +
                            (groups - 1) / m.groups_per_block * m.scale_block +
                            std::min<std::int64_t>(groups, m.groups_per_block) * m.scale_group;
  const auto bytes = static_cast<std::int64_t>(size_bytes(format.scale_dtype));
  return {m.scales, m.scales + (last + 1) * bytes};
}

/// Packed bytes of experts [first, last).
std::array<Extent, 2> packed_of(const PackedMemory& memory, int first, int last) {
  const auto part = [&](const std::byte* base, std::size_t bytes) {
    return Extent{base + static_cast<std::size_t>(first) * bytes,
                  base + static_cast<std::size_t>(last) * bytes};
  };
  return {part(memory.gate_up, memory.sizes.gate_up_bytes),
          part(memory.down, memory.sizes.down_bytes)};
}

bool overlap(const RepackFormat& format, const MatrixSource& m, const MatrixShape& shape,
             const std::array<Extent, 2>& packed) {
  const Extent codes = codes_of(m, shape), scales = scales_of(format, m, shape);
  return std::ranges::any_of(
      packed, [&](const Extent& p) { return p.overlaps(codes) || p.overlaps(scales); });
}

void check_matrix(const RepackFormat& format, const MatrixSource& m, int expert, const char* name) {
  check_argument(m.codes != nullptr && m.scales != nullptr, "expert {} {}: no {}", expert, name,
                 m.codes == nullptr ? "codes" : "scales");
  const auto address = reinterpret_cast<std::uintptr_t>(m.codes);
  check_argument(m.row_bytes >= 0 && m.word_bytes >= 0 && m.scale_row >= 0 && m.scale_block >= 0 &&
                     m.scale_group >= 0 && m.groups_per_block >= 1,
                 "expert {} {}: strides are negative", expert, name);
  check_argument(address % 2 == 0 && m.row_bytes % 2 == 0 && m.word_bytes % 2 == 0,
                 "expert {} {}: codes at {:#x} with rows of {} and words of {} bytes are not "
                 "aligned to 2 bytes",
                 expert, name, address, m.row_bytes, m.word_bytes);
  check_argument(reinterpret_cast<std::uintptr_t>(m.scales) % size_bytes(format.scale_dtype) == 0,
                 "expert {} {}: scales are not aligned to their size", expert, name);
}

[[noreturn]] void refuse_repacking() {
  fail(ErrorCode::kUnsupported, "this backend repacks weights of host memory alone");
}

}  // namespace

std::unique_ptr<PreparedExperts> BackendOps::make_room(const RepackFormat&,
                                                       const MutableTensorView&) {
  refuse_repacking();
}
void BackendOps::repack(PreparedExperts&, int, std::span<const ExpertSource>, Stream) {
  refuse_repacking();
}
void ExpertPacker::add_bias(ExpertBuilder&, int, MatrixRole, std::span<const float>) {
  refuse_bias();
}
void BackendOps::finish_repack(PreparedExperts&, Stream) {
  refuse_repacking();
}

MatrixSource dense_source(const std::byte* codes, const std::byte* scales, std::int64_t k,
                          int group_size) {
  return {.codes = codes, .row_bytes = k / 2, .scales = scales, .scale_row = k / group_size};
}

void check_format(const RepackFormat& format) {
  const ModelGeometry& g = format.geometry;
  for (const auto& [name, value] :
       {std::pair{"hidden", g.hidden}, {"intermediate", g.intermediate}}) {
    check_argument(value > 0 && value % kActivationGroup == 0 && value < 1 << 20,
                   "{} {} is not a positive multiple of {} below 2^20", name, value,
                   kActivationGroup);
  }
  check_argument(format.num_experts >= 1 && format.num_experts <= kMaxExperts,
                 "num_experts {} is not in [1, {}]", format.num_experts, kMaxExperts);
  check_argument(allows_group_size(g.weight_format, g.group_size), "group_size {} is {}",
                 g.group_size, group_size_refusal(g.weight_format));
  check_argument(allows_scale_dtype(g.weight_format, format.scale_dtype),
                 "scales are {}, expected {}", to_string(format.scale_dtype),
                 scale_dtype_names(g.weight_format));
  check_argument(
      g.weight_format == WeightFormat::kInt4 || format.codes == CodeKind::kTwosComplement,
      "codes with an offset: {} has none", to_string(g.weight_format));
  check_activation(g.activation);
  if (g.has_bias) refuse_bias();
}

PackedSizes packed_sizes(const RepackFormat& format, Device::Kind kind) {
  check_format(format);
  return traits_of(kind).packed_sizes(format.geometry, format.scale_dtype);
}

std::size_t packed_bytes(const RepackFormat& format, Device::Kind kind) {
  const PackedSizes sizes = packed_sizes(format, kind);
  return static_cast<std::size_t>(format.num_experts) * (sizes.gate_up_bytes + sizes.down_bytes);
}

PackedMemory split_memory(const RepackFormat& format, const MutableTensorView& memory,
                          const Device& device) {
  const PackedSizes sizes = packed_sizes(format, device.kind);
  const std::size_t needed = packed_bytes(format, device.kind);
  check_argument(memory.device == device, "memory is on another device than the backend");
  check_argument(memory.bytes() >= needed, "memory has {} bytes, the packed weights {}",
                 memory.bytes(), needed);
  check_argument(reinterpret_cast<std::uintptr_t>(memory.data) % sizes.alignment == 0,
                 "memory is not aligned to {} bytes", sizes.alignment);
  auto* const base = memory.as<std::byte>();
  return {.gate_up = base,
          .down = base + static_cast<std::size_t>(format.num_experts) * sizes.gate_up_bytes,
          .sizes = sizes};
}

void check_sources(const RepackFormat& format, const PackedMemory& memory, int first,
                   std::span<const ExpertSource> sources) {
  const auto count = static_cast<int>(sources.size());
  check_argument(first >= 0 && first + count <= format.num_experts,
                 "experts [{}, {}) are not within the {} of this room", first, first + count,
                 format.num_experts);
  for (int i = 0; i < count; ++i) {
    const int expert = format.first_expert + first + i;
    const std::array<Extent, 2> before = packed_of(memory, first, first + i);
    for (std::size_t m = 0; m < kMatrixNames.size(); ++m) {
      const MatrixSource& source = *matrices_of(sources[static_cast<std::size_t>(i)])[m];
      check_matrix(format, source, expert, kMatrixNames[m]);
      check_argument(
          !overlap(format, source, shape_of(format, m), before),
          "expert {} {}: packing the experts before it overwrites it; let it lie further "
          "back in the memory",
          expert, kMatrixNames[m]);
    }
  }
}

bool overlaps_itself(const RepackFormat& format, const PackedMemory& memory, int first,
                     std::span<const ExpertSource> sources) {
  const auto count = static_cast<int>(sources.size());
  const std::array<Extent, 2> packed = packed_of(memory, first, first + count);
  return std::ranges::any_of(sources, [&](const ExpertSource& source) {
    const std::array<const MatrixSource*, 3> matrices = matrices_of(source);
    for (std::size_t m = 0; m < matrices.size(); ++m) {
      if (overlap(format, *matrices[m], shape_of(format, m), packed)) return true;
    }
    return false;
  });
}

bool overlaps_codes_alone(const RepackFormat& format, const PackedMemory& memory, int first,
                          std::span<const ExpertSource> sources) {
  const auto count = static_cast<int>(sources.size());
  const std::array<Extent, 2> packed = packed_of(memory, first, first + count);
  return std::ranges::all_of(sources, [&](const ExpertSource& source) {
    const std::array<const MatrixSource*, 3> matrices = matrices_of(source);
    for (std::size_t m = 0; m < matrices.size(); ++m) {
      const Extent scales = scales_of(format, *matrices[m], shape_of(format, m));
      if (packed[0].overlaps(scales) || packed[1].overlaps(scales)) return false;
    }
    // Codes of gate and up are read before a down is written; check_sources() has seen the rest.
    return !packed[0].overlaps(codes_of(source.down, shape_of(format, 2)));
  });
}

bool leaves_down(const RepackFormat& format, const PackedMemory& memory, int index,
                 const ExpertSource& source) {
  const std::array<Extent, 2> own = packed_of(memory, index, index + 1);
  return !overlap(format, source.down, shape_of(format, 2), {own[0], own[0]});
}

void throw_scale_fault(std::uint64_t fault, const RepackFormat& format) {
  if (fault == kNoFault) return;
  const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(fault & 0xffff) << 16);
  if (std::fabs(value) < kScaleLimit) {  // Of MXFP4 on CUDA.
    fail(ErrorCode::kInvalidArgument,
         "expert {} {}: scale [{}, {}] = {} is more than 2^127 times below another of its row "
         "within 128 weights",
         format.first_expert + static_cast<int>(fault >> 54), kMatrixNames[fault >> 52 & 3],
         fault >> 32 & 0xfffff, fault >> 16 & 0xffff, value);
  }
  fail(ErrorCode::kInvalidArgument,
       "expert {} {}: scale [{}, {}] = {} is not a finite number below 2^118",
       format.first_expert + static_cast<int>(fault >> 54), kMatrixNames[fault >> 52 & 3],
       fault >> 32 & 0xfffff, fault >> 16 & 0xffff, value);
}

}  // namespace sluice
