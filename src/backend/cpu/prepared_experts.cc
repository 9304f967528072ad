#include "backend/cpu/prepared_experts.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "backend/check_experts.h"
#include "backend/cpu/repack_kernel.h"
#include "core/fail.h"
#include "core/threads.h"
#include "sluice/quant.h"

namespace sluice::cpu {
namespace {

/// w + 8 in every nibble: the sign bit of a two's complement nibble flips.
constexpr std::uint32_t kFlipSigns = 0x88888888u;

void check_weight_format(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
    case WeightFormat::kMxfp4:
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
  out.format = m.format;
  out.scale_dtype = m.scales.dtype;
  out.group_size = m.group_size;
  out.n = m.n();
  out.k = m.k();
  out.has_bias = m.has_bias();
  return out;
}

PreparedMatrix describe(const RepackFormat& format, std::int64_t n, std::int64_t k) {
  PreparedMatrix out;
  out.format = format.geometry.weight_format;
  out.scale_dtype = format.scale_dtype;
  out.group_size = format.geometry.group_size;
  out.n = n;
  out.k = k;
  return out;
}

MatrixSource source_of(const QuantMatrix& m) {
  return dense_source(m.codes.as<std::byte>(), m.scales.as<std::byte>(), m.k(), m.group_size);
}

/// Gives the matrices of one expert their memory: codes and scales of each after the other.
void place(PreparedExpert& e, std::byte* gate_up, std::byte* down) {
  const auto put = [](PreparedMatrix& m, std::byte* at) {
    m.codes = reinterpret_cast<const std::uint8_t*>(at);
    m.scales = at + PreparedMatrix::whole_pages(m.code_bytes());
    if (m.has_bias) {
      m.bias = reinterpret_cast<const float*>(at + m.memory_bytes() -
                                              PreparedMatrix::whole_pages(m.bias_bytes()));
    }
    return at + m.memory_bytes();
  };
  put(e.up, put(e.gate, gate_up));
  put(e.down, down);
}

/// What turns a source's nibbles into the stored ones: int4 gets its offset, unless it has it.
std::uint32_t flip_of(const PreparedMatrix& m, CodeKind codes) {
  return m.format == WeightFormat::kInt4 && codes == CodeKind::kTwosComplement ? kFlipSigns : 0;
}

/// One matrix on its way.
struct Move {
  const MatrixSource& from;
  const PreparedMatrix& to;
  std::uint32_t flip;  ///< flip_of()
  int expert;
  PackedMatrix which;
};

/// Rows [16 * block, 16 * block + 16) of codes, four bytes of a row at a time.
void repack_codes(const Move& m, std::int64_t block) {
  const std::byte* in = m.from.codes + block * kBlockN * m.from.row_bytes;
  auto* out = const_cast<std::uint8_t*>(m.to.codes) + block * kBlockN * m.to.k / 2;
  if (m.from.word_bytes == 4) {
    transpose_words(in, m.from.row_bytes, m.to.k / kLineK, m.flip, out);
    return;
  }
  for (std::int64_t line = 0; line < m.to.k / kLineK; ++line) {
    for (int lane = 0; lane < kBlockN; ++lane) {
      std::uint32_t word;
      std::memcpy(&word, in + lane * m.from.row_bytes + line * m.from.word_bytes, 4);
      word ^= m.flip;
      std::memcpy(out + line * kLineBytes + lane * 4, &word, 4);
    }
  }
}

std::uint32_t float_bits(std::uint16_t bf16) {
  return static_cast<std::uint32_t>(bf16) << 16;
}
std::uint32_t float_bits(float value) {
  return std::bit_cast<std::uint32_t>(value);
}
std::uint32_t float_bits(std::uint8_t e8m0) {
  return std::bit_cast<std::uint32_t>(e8m0_to_float(e8m0));
}

/// The scales of the same rows. Returns the first fault.
template <class T>
std::uint64_t repack_scales(const Move& m, std::int64_t block) {
  const std::int64_t groups = m.to.k / m.to.group_size;
  const auto* in = reinterpret_cast<const T*>(m.from.scales);
  T* out = static_cast<T*>(const_cast<void*>(m.to.scales)) + block * kBlockN * groups;
  std::uint64_t fault = kNoFault;
  for (int lane = 0; lane < kBlockN; ++lane) {
    const std::int64_t row = block * kBlockN + lane;
    const T* from = in + row * m.from.scale_row;
    for (std::int64_t g = 0; g < groups; from += m.from.scale_block) {
      const std::int64_t end = std::min(groups, g + m.from.groups_per_block);
      for (const T* next = from; g < end; ++g, next += m.from.scale_group) {
        out[g * kBlockN + lane] = *next;
        const std::uint32_t bits = float_bits(*next);
        if (std::fabs(std::bit_cast<float>(bits)) < kScaleLimit) continue;  // Not so for NaN.
        fault = std::min(fault, scale_fault(m.expert, m.which, row, g, bits));
      }
    }
  }
  return fault;
}

std::uint64_t repack_scales_of(const Move& m, std::int64_t block) {
  if (m.to.scale_dtype == DType::kBFloat16) return repack_scales<std::uint16_t>(m, block);
  if (m.to.scale_dtype == DType::kFloat32) return repack_scales<float>(m, block);
  SLUICE_ASSERT(m.to.scale_dtype == DType::kFloat8E8M0);
  return repack_scales<std::uint8_t>(m, block);
}

/// Blocks [first, last) into the memory that `to` views.
std::uint64_t repack_blocks(const Move& m, std::int64_t first, std::int64_t last) {
  std::uint64_t fault = kNoFault;
  for (std::int64_t block = first; block < last; ++block) {
    repack_codes(m, block);
    fault = std::min(fault, repack_scales_of(m, block));
  }
  return fault;
}

void lower(std::atomic<std::uint64_t>& least, std::uint64_t value) {
  std::uint64_t seen = least.load();
  while (value < seen && !least.compare_exchange_weak(seen, value)) {
  }
}

}  // namespace

PreparedCpuExperts::PreparedCpuExperts(const ExpertWeights& weights, const MemoryNodes& nodes)
    : format_{.geometry = weights.geometry,
              .num_experts = static_cast<int>(weights.experts.size()),
              .first_expert = weights.first_expert} {
  check_kind(activation());
  check_argument(hidden() > 0 && hidden() % kActivationGroup == 0,
                 "hidden {} is not a multiple of {}", hidden(), int{kActivationGroup});
  check_argument(intermediate() > 0 && intermediate() % kActivationGroup == 0,
                 "intermediate {} is not a multiple of {}", intermediate(), int{kActivationGroup});
  for (const Expert& e : weights.experts) {
    for (const QuantMatrix* m : {&e.gate, &e.up, &e.down}) check_weight_format(m->format);
  }
  check_experts(weights);
  std::size_t gate_up = 0, down = 0;  // Experts may differ in their scales: the largest of each.
  for (const Expert& e : weights.experts) {
    experts_.push_back({describe(e.gate), describe(e.up), describe(e.down)});
    const PreparedExpert& p = experts_.back();
    gate_up = std::max(gate_up, p.gate.memory_bytes() + p.up.memory_bytes());
    down = std::max(down, p.down.memory_bytes());
  }
  memory_ = PageBuffer(experts_.size() * (gate_up + down), PageBuffer::Pages::kHuge);
  packed_ = {.gate_up = memory_.data(),
             .down = memory_.data() + experts_.size() * gate_up,
             .sizes = {.gate_up_bytes = gate_up, .down_bytes = down}};
  for (std::size_t i = 0; i < experts_.size(); ++i) {
    place(experts_[i], packed_.gate_up + i * gate_up, packed_.down + i * down);
  }
  place_codes(nodes);
}

void PreparedCpuExperts::place_codes(const MemoryNodes& nodes) const {
  for (const PreparedExpert& e : experts_) {
    for (const PreparedMatrix* m : {&e.gate, &e.up, &e.down}) {
      auto* const codes = reinterpret_cast<std::byte*>(const_cast<std::uint8_t*>(m->codes));
      nodes.place(codes, static_cast<std::size_t>(m->code_bytes()), m->n / kActivationGroup);
    }
  }
}

void PreparedCpuExperts::copy_to_host(std::byte* host) const {
  const std::size_t gate_up = experts_.size() * packed_.sizes.gate_up_bytes;
  std::memcpy(host, packed_.gate_up, gate_up);
  std::memcpy(host + gate_up, packed_.down, experts_.size() * packed_.sizes.down_bytes);
}

std::array<std::span<std::byte>, 2> PreparedCpuExperts::expert_bytes(int index) {
  return part_bytes(packed_, index);
}

const PreparedMatrix& PreparedCpuExperts::matrix(int index, MatrixRole role) const {
  const PreparedExpert& e = experts_[static_cast<std::size_t>(index)];
  return role == MatrixRole::kGate ? e.gate : role == MatrixRole::kUp ? e.up : e.down;
}

void PreparedCpuExperts::set_bias(int index, MatrixRole role, std::span<const float> bias) {
  const PreparedMatrix& to = matrix(index, role);
  check_argument(to.has_bias && static_cast<std::int64_t>(bias.size()) == to.n,
                 "expert {}: a bias of {} numbers is not what was announced", index, bias.size());
  std::ranges::copy(bias, const_cast<float*>(to.bias));
}

std::int64_t PreparedCpuExperts::repack_rows(int index, MatrixRole role, const TensorView& scales,
                                             std::int64_t first_row,
                                             std::span<const std::byte> codes) {
  PreparedMatrix out = matrix(index, role);
  const std::int64_t row_bytes = out.k / 2, groups = out.k / out.group_size;
  const std::int64_t rows = static_cast<std::int64_t>(codes.size()) / row_bytes;
  const DType dtype = out.scale_dtype;
  check_argument(scales.dtype == dtype && scales.shape == Shape({out.n, groups}) &&
                     rows % kBlockN == 0 && first_row + rows <= out.n,
                 "expert {}: rows [{}, {}) with {} scales {} are not what was announced", index,
                 first_row, first_row + rows, to_string(scales.dtype), scales.shape.to_string());
  const std::int64_t scales_before =
      first_row * groups * static_cast<std::int64_t>(size_bytes(dtype));
  const MatrixSource part =
      dense_source(codes.data(), scales.as<std::byte>() + scales_before, out.k, out.group_size);
  out.codes += first_row * row_bytes;  // Blocks of 16 rows follow each other without gaps.
  out.scales = static_cast<const std::byte*>(out.scales) + scales_before;
  const Move move{part, out, flip_of(out, CodeKind::kTwosComplement), index,
                  static_cast<PackedMatrix>(role)};
  lower(scale_fault_, repack_blocks(move, 0, rows / kBlockN));
  return rows;
}

void PreparedCpuExperts::repack(const ExpertWeights& weights, ThreadPool& pool) {
  for (std::size_t i = 0; i < experts_.size(); ++i) {
    const Expert& e = weights.experts[i];
    const ExpertSource source{source_of(e.gate), source_of(e.up), source_of(e.down)};
    repack_expert(static_cast<int>(i), source, experts_[i], pool);
    for (const MatrixRole role : {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown}) {
      const QuantMatrix& m = e.matrix(role);
      if (!m.has_bias()) continue;
      set_bias(static_cast<int>(i), role,
               {m.bias.as<float>(), static_cast<std::size_t>(m.bias.dim(0))});
    }
    weights.release_pages(static_cast<int>(i));
  }
  finish();
}

PreparedCpuExperts::PreparedCpuExperts(const RepackFormat& format, const MutableTensorView& memory,
                                       const MemoryNodes& nodes)
    : format_(format) {
  check_format(format);
  check_weight_format(format.geometry.weight_format);
  check_kind(activation());
  MutableTensorView room = memory;
  if (room.empty()) {
    const std::size_t bytes = packed_bytes(format, Device::Kind::kHost);
    memory_ = PageBuffer(bytes, PageBuffer::Pages::kHuge);
    room.data = memory_.data(), room.dtype = DType::kUInt8;
    room.shape = {static_cast<std::int64_t>(bytes)};
  }
  packed_ = split_memory(format, room, {});
  for (int i = 0; i < format.num_experts; ++i) {
    const auto at = static_cast<std::size_t>(i);
    experts_.push_back({describe(format, intermediate(), hidden()),
                        describe(format, intermediate(), hidden()),
                        describe(format, hidden(), intermediate())});
    place(experts_.back(), packed_.gate_up + at * packed_.sizes.gate_up_bytes,
          packed_.down + at * packed_.sizes.down_bytes);
  }
  if (memory.empty()) place_codes(nodes);
}

void PreparedCpuExperts::repack_expert(int index, const ExpertSource& source,
                                       const PreparedExpert& out, ThreadPool& pool) {
  // 128 channels, of which every N is a multiple.
  constexpr std::int64_t kBlocksPerTask = kActivationGroup / kBlockN;
  const std::int64_t inner = intermediate() / kActivationGroup;
  pool.for_each_task(2 * inner + hidden() / kActivationGroup, [&](std::int64_t task, int) {
    const auto move = [&](const MatrixSource& from, const PreparedMatrix& to, PackedMatrix which) {
      const Move m{from, to, flip_of(to, format_.codes), index, which};
      lower(scale_fault_, repack_blocks(m, task * kBlocksPerTask, (task + 1) * kBlocksPerTask));
    };
    if (task < inner) return move(source.gate, out.gate, PackedMatrix::kGate);
    task -= inner;
    if (task < inner) return move(source.up, out.up, PackedMatrix::kUp);
    task -= inner;
    move(source.down, out.down, PackedMatrix::kDown);
  });
}

void PreparedCpuExperts::repack(int first, std::span<const ExpertSource> sources,
                                ThreadPool& pool) {
  check_sources(format_, packed_, first, sources);
  const PackedSizes& sizes = packed_.sizes;
  PageBuffer aside;  // An expert that would overwrite itself is packed here first.
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const int index = first + static_cast<int>(i);
    const auto at = static_cast<std::size_t>(index);
    if (!overlaps_itself(format_, packed_, index, sources.subspan(i, 1))) {
      repack_expert(index, sources[i], experts_[at], pool);
      continue;
    }
    if (aside.data() == nullptr) aside = PageBuffer(sizes.gate_up_bytes + sizes.down_bytes);
    PreparedExpert there = experts_[at];
    place(there, aside.data(), aside.data() + sizes.gate_up_bytes);
    repack_expert(index, sources[i], there, pool);
    std::memcpy(packed_.gate_up + at * sizes.gate_up_bytes, aside.data(), sizes.gate_up_bytes);
    std::memcpy(packed_.down + at * sizes.down_bytes, aside.data() + sizes.gate_up_bytes,
                sizes.down_bytes);
  }
}

}  // namespace sluice::cpu
