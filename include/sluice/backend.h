// backend.h - one device that quantizes rows and runs expert GEMMs.
//
// A Backend serves one rank. Its operations are internal (src/backend/ops.h); outside, it is a
// value to hand to Exchange and Engine. On the CPU it owns a pool of pinned threads.
#pragma once

#include <memory>
#include <string>

#include "sluice/tensor.h"

namespace sluice {

struct BackendConfig {
  Device device;
  /// CPU only: worker threads, caller included; 0 = this rank's even share of the cores the process
  /// may run on, at least one.
  int num_threads = 0;
  /// CPU only: which share of the cores, when several ranks are threads of this process.
  int local_rank = 0;
  int num_local_ranks = 1;
};

class Backend {
 public:
  virtual ~Backend() = default;
  [[nodiscard]] virtual Device device() const noexcept = 0;
  /// For reports: "cpu, 2 threads, AVX2" or "cuda:0, NVIDIA H200, 132 SMs".
  [[nodiscard]] virtual std::string description() const = 0;
  /// Bytes per second this device reads from main memory, measured now (about 0.2 s).
  [[nodiscard]] virtual double measure_read_bandwidth() = 0;
};

/// Throws: kInvalidArgument, kUnsupported (a CUDA device in a build or on a machine without one).
[[nodiscard]] std::unique_ptr<Backend> make_backend(const BackendConfig& config);

}  // namespace sluice
