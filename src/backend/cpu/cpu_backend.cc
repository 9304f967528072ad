#include "backend/cpu/cpu_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "backend/cpu/ceilings.h"
#include "backend/cpu/row_kernels.h"
#include "core/fail.h"

namespace sluice {

std::unique_ptr<Backend> make_cpu_backend(const BackendConfig& config) {
  check_argument(config.device.index == 0, "host device index {} is not 0", config.device.index);
  check_argument(config.num_threads >= 0, "num_threads {} is negative", config.num_threads);
  const std::vector<int> cores =
      core_share(available_cores(), config.local_rank, config.num_local_ranks);
  const int num_threads =
      config.num_threads > 0 ? config.num_threads : static_cast<int>(cores.size());
  return std::make_unique<cpu::CpuBackend>(num_threads, cores);
}

namespace cpu {

namespace {

class CpuBuilder final : public ExpertBuilder {
 public:
  CpuBuilder(const ExpertWeights& shapes, const MemoryNodes& nodes)
      : experts(std::make_unique<PreparedCpuExperts>(shapes, nodes)) {}
  [[nodiscard]] std::unique_ptr<PreparedExperts> finish() override {
    experts->finish();
    return std::move(experts);
  }

  std::unique_ptr<PreparedCpuExperts> experts;
};

/// Repacks on the calling thread, so nothing ever waits.
class CpuPacker final : public ExpertPacker {
 public:
  explicit CpuPacker(const PackerSizes& sizes)
      : piece_(sizes.piece_bytes), scales_memory_(sizes.scales_bytes) {}
  [[nodiscard]] std::span<std::byte> next_scales() override {
    return {scales_memory_.data(), scales_memory_.bytes()};
  }
  [[nodiscard]] std::span<std::byte> next_piece() override {
    return {piece_.data(), piece_.bytes()};
  }
  void add_scales(ExpertBuilder& to, int index, MatrixRole role,
                  const TensorView& scales) override {
    experts_ = static_cast<CpuBuilder&>(to).experts.get();
    index_ = index, role_ = role, scales_ = scales, next_row_ = 0;
  }
  void add_bias(ExpertBuilder& to, int index, MatrixRole role,
                std::span<const float> bias) override {
    static_cast<CpuBuilder&>(to).experts->set_bias(index, role, bias);
  }
  void add_rows(std::span<const std::byte> codes) override {
    next_row_ += experts_->repack_rows(index_, role_, scales_, next_row_, codes);
  }
  void flush() override {}
  [[nodiscard]] std::size_t host_bytes() const noexcept override {
    return piece_.bytes() + scales_memory_.bytes();
  }

 private:
  PageBuffer piece_, scales_memory_;
  PreparedCpuExperts* experts_ = nullptr;  // Of the matrix that is being added.
  int index_ = 0;
  MatrixRole role_ = MatrixRole::kGate;
  TensorView scales_;
  std::int64_t next_row_ = 0;
};

}  // namespace

CpuBackend::CpuBackend(int num_threads, const std::vector<int>& cores,
                       const std::filesystem::path& node_root)
    : pool_(num_threads, cores), nodes_(cores, num_threads, node_root), stage_(pool_, nodes_) {}

std::string CpuBackend::description() const {
  return fmt::format("cpu, {} thread{}, {}", pool_.num_threads(),
                     pool_.num_threads() == 1 ? "" : "s", instruction_set());
}

double CpuBackend::measure_read_bandwidth() {
  return read_bytes_per_second(pool_);
}

double CpuBackend::measure_arithmetic_rate() {
  double most = 0;
  for (const ArithmeticRate& rate : measure_arithmetic_rates()) {
    most = std::max(most, rate.operations_per_s);
  }
  return most;
}

std::vector<ArithmeticRate> CpuBackend::measure_arithmetic_rates() {
  return dot_rates(pool_);
}

std::unique_ptr<DeviceBuffer> CpuBackend::allocate(std::size_t bytes) {
  return std::make_unique<PageBuffer>(bytes);
}

void CpuBackend::copy_to_host(void* host, const void* device, std::size_t bytes, Stream) {
  if (bytes > 0) std::memcpy(host, device, bytes);
}

void CpuBackend::copy_from_host(void* device, const void* host, std::size_t bytes, Stream) {
  if (bytes > 0) std::memcpy(device, host, bytes);
}

void CpuBackend::copy_on_device(void* to, const void* from, std::size_t bytes, Stream) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

std::unique_ptr<PreparedExperts> CpuBackend::prepare(const ExpertWeights& weights) {
  auto experts = std::make_unique<PreparedCpuExperts>(weights, nodes_);
  experts->repack(weights, pool_);
  return experts;
}

std::unique_ptr<ExpertBuilder> CpuBackend::make_builder(const ExpertWeights& shapes) {
  return std::make_unique<CpuBuilder>(shapes, nodes_);
}

std::unique_ptr<ExpertPacker> CpuBackend::make_packer(const PackerSizes& sizes) {
  return std::make_unique<CpuPacker>(sizes);
}

std::unique_ptr<PreparedExperts> CpuBackend::make_room(const RepackFormat& format,
                                                       const MutableTensorView& memory) {
  return std::make_unique<PreparedCpuExperts>(format, memory, nodes_);
}

void CpuBackend::repack(PreparedExperts& room, int first, std::span<const ExpertSource> sources,
                        Stream) {
  static_cast<PreparedCpuExperts&>(room).repack(first, sources, pool_);
}

void CpuBackend::finish_repack(PreparedExperts& room, Stream) {
  static_cast<PreparedCpuExperts&>(room).finish();
}

void CpuBackend::for_each_row(const RowRanges& rows,
                              const std::function<void(std::int64_t row)>& body) {
  check_rows(rows);
  std::int64_t total = 0;
  for (int e = 0; e < rows.num_experts; ++e) total += rows.num_rows(e);
  const std::int64_t threads = pool_.num_threads();
  if (total == 0) return;
  pool_.run([&](int thread) {
    const std::int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
    std::int64_t before = 0;  // Rows of the experts before e.
    for (int e = 0; e < rows.num_experts && before < last; ++e) {
      const std::int64_t count = rows.num_rows(e);
      const std::int64_t end = std::min(before + count, last);
      for (std::int64_t i = std::max(before, first); i < end; ++i) {
        body(rows.first_row(e) + i - before);
      }
      before += count;
    }
  });
}

void CpuBackend::quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2,
                          const Fp8Rows& out, Stream) {
  check_argument(out.width > 0 && out.width % kGroup == 0, "width {} is not a multiple of {}",
                 out.width, kGroup);
  const GroupScale kind = out.scale_per_row ? GroupScale::kToken
                          : pow2            ? GroupScale::kPow2
                                            : GroupScale::kAmax;
  for_each_row(rows, [&](std::int64_t row) {
    std::uint8_t* codes = out.row(row);
    const std::uint16_t* in = x + row * out.width;
    if (out.scale != nullptr) {
      quantize_row(in, out.width, kind, codes, out.scale + row * out.num_scales());
    } else {
      quantize_row_static(in, out.width, out.static_scale, codes);
    }
  });
}

void CpuBackend::requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                            Stream) {
  check_argument(in.width == out.width && in.width > 0 && in.width % kGroup == 0,
                 "widths {} and {} are not one multiple of {}", in.width, out.width, kGroup);
  check_argument(in.scale != nullptr && !in.scale_per_row, "requantize needs group-scaled rows");
  for_each_row(rows, [&](std::int64_t row) {
    requantize_row(in.row(row), in.scale + row * (in.width / kGroup), in.width, out.static_scale,
                   out.row(row));
  });
}

void CpuBackend::expert_stage(const PreparedExperts& experts, const Fp8RowsView& in,
                              const RowRanges& rows, const Fp8Rows& h, std::uint16_t* out, Stream,
                              ExpertStageTimes* times) {
  stage_.run(static_cast<const PreparedCpuExperts&>(experts), in, rows, h, out, times);
}

}  // namespace cpu
}  // namespace sluice
