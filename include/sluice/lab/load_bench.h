// load_bench.h - the measurement behind `sluice bench load`: how fast experts come from a
// checkpoint's files to a device, beside what the files and the device could give.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/backend.h"
#include "sluice/checkpoint.h"

namespace sluice {

struct LoadBenchConfig {
  std::vector<int> layers;  ///< At least one.
  int num_ranks = 1;        ///< That share the experts of each layer; divides their number.
  int rank = 0;             ///< Whose experts are loaded.
  int num_threads = 0;      ///< LoadOptions::num_threads; the plain read has as many.
  int repeats = 3;          ///< Timed reads and loads from warm files; the median counts.
  bool with_cold = true;    ///< Also once from files that the system does not hold in memory.
  bool with_check = true;   ///< First compare with experts that were mapped and repacked.
};

/// One state of the files.
struct LoadBenchPass {
  bool is_cold = false;
  double cached_share = 0;      ///< Of the bytes to read, in memory right before the read and load.
  double read_bytes_per_s = 0;  ///< Plain reads of the same tensors, by as many threads.
  /// The same into new memory that keeps all of them; 0 unless the experts' device is the host.
  double kept_read_bytes_per_s = 0;
  double load_bytes_per_s = 0;  ///< Bytes of the files by the time to have them prepared.
  double load_seconds = 0;
};

struct LoadBenchReport {
  std::string device;
  int num_experts = 0;           ///< Of each layer, of this rank.
  std::uint64_t file_bytes = 0;  ///< Of all layers, of this rank.
  std::uint64_t prepared_bytes = 0;
  int num_threads = 0;
  std::size_t slots_bytes = 0;  ///< Host memory that matrices are read into, all threads.
  /// Most that anonymous memory of the process grew by during a load, less prepared experts where
  /// they are in host memory.
  std::size_t host_growth_bytes = 0;
  double copy_bytes_per_s = 0;    ///< From page-locked memory to the device; 0 on the CPU.
  double first_load_seconds = 0;  ///< The first load of the process, which also locks memory.
  std::uint64_t digest = 0;       ///< Of all prepared bytes; 0 without a check.
  /// Why there is no cold pass, if one was asked for; empty otherwise.
  std::string without_cold;
  std::vector<LoadBenchPass> passes = {};

  /// What bounds a load: the slower of reading and copying, on the CPU of reading into memory that
  /// is overwritten and into memory that is kept.
  [[nodiscard]] double bound(const LoadBenchPass& pass) const noexcept;
};

/// Throws: kInternal naming the layer if a byte of its prepared experts differs from those that
///   were
///   mapped and repacked (nothing is timed then); whatever loading throws; kInvalidArgument.
[[nodiscard]] LoadBenchReport bench_load(const LoadBenchConfig& config,
                                         const Checkpoint& checkpoint, Backend& backend,
                                         const std::function<void(double)>& on_progress = {});

}  // namespace sluice
