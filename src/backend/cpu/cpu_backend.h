// cpu_backend.h - the expert layer on host cores. Operations return when the work is done.
//
// Threads: one caller at a time. Bits depend neither on the number of threads, nor on the
// instruction set, nor on which rows are computed together (digits.h, gemm_tile.h).
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "backend/cpu/expert_stage.h"
#include "backend/cpu/memory_nodes.h"
#include "backend/ops.h"
#include "core/threads.h"

namespace sluice {

/// Throws: kInvalidArgument.
[[nodiscard]] std::unique_ptr<Backend> make_cpu_backend(const BackendConfig& config);

namespace cpu {

class CpuBackend final : public BackendOps {
 public:
  /// `node_root`: see MemoryNodes.
  CpuBackend(int num_threads, const std::vector<int>& cores,
             const std::filesystem::path& node_root = "/sys/devices/system/node");

  [[nodiscard]] Device device() const noexcept override { return {}; }
  [[nodiscard]] std::string description() const override;
  [[nodiscard]] double measure_read_bandwidth() override;
  [[nodiscard]] double measure_arithmetic_rate() override;
  [[nodiscard]] std::vector<ArithmeticRate> measure_arithmetic_rates() override;
  [[nodiscard]] std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes) override;
  void copy_to_host(void* host, const void* device, std::size_t bytes, Stream) override;
  void copy_from_host(void* device, const void* host, std::size_t bytes, Stream) override;
  void copy_on_device(void* to, const void* from, std::size_t bytes, Stream) override;

  [[nodiscard]] std::unique_ptr<PreparedExperts> prepare(const ExpertWeights& weights) override;
  [[nodiscard]] std::unique_ptr<PreparedExperts> make_room(
      const RepackFormat& format, const MutableTensorView& memory) override;
  void repack(PreparedExperts& room, int first, std::span<const ExpertSource> sources,
              Stream) override;
  void finish_repack(PreparedExperts& room, Stream) override;
  [[nodiscard]] std::unique_ptr<ExpertBuilder> make_builder(const ExpertWeights& shapes) override;
  [[nodiscard]] std::unique_ptr<ExpertPacker> make_packer(const PackerSizes& sizes) override;
  [[nodiscard]] int num_host_threads() const noexcept override { return pool_.num_threads(); }
  void quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2, const Fp8Rows& out,
                Stream stream) override;
  void requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                  Stream stream) override;
  void expert_stage(const PreparedExperts& experts, const Fp8RowsView& in, const RowRanges& rows,
                    const Fp8Rows& h, std::uint16_t* out, Stream stream,
                    ExpertStageTimes* times) override;
  void gather_tokens(const TokenRows& tokens, const EntryRows& entries, const Fp8Rows& out,
                     Stream stream) override;
  void sum_entries(const EntrySums& sums, Stream stream) override;

  [[nodiscard]] ThreadPool& pool() noexcept { return pool_; }

 private:
  /// body(row) for every valid row, shared among the threads.
  void for_each_row(const RowRanges& rows, const std::function<void(std::int64_t row)>& body);

  ThreadPool pool_;
  MemoryNodes nodes_;
  ExpertStage stage_;
};

}  // namespace cpu
}  // namespace sluice
