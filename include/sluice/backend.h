// backend.h - one device that quantizes rows and runs expert GEMMs.
//
// A Backend serves one rank. Its operations are internal (src/backend/ops.h); outside, it is a
// value to hand to Exchange and Engine. On the CPU it owns a pool of pinned threads.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice {

struct BackendConfig {
  Device device{};
  /// CPU only: worker threads, caller included; 0 = this rank's even share of the cores the process
  /// may run on, at least one.
  int num_threads = 0;
  /// Which share of the cores, when several ranks are threads of this process. CUDA: how many ranks
  /// use this device; each gets an even share of its SMs.
  int local_rank = 0;
  int num_local_ranks = 1;
};

/// Device memory owned by a backend; freed by its destructor.
class DeviceBuffer {
 public:
  virtual ~DeviceBuffer() = default;
  [[nodiscard]] virtual std::byte* data() const noexcept = 0;
  [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  [[nodiscard]] virtual Device device() const noexcept = 0;
  /// For reports: "cpu, 2 threads, AVX2" or "cuda:0, NVIDIA H200, 132 SMs".
  [[nodiscard]] virtual std::string description() const = 0;
  /// Bytes per second this device reads from main memory, measured now (about 0.2 s).
  [[nodiscard]] virtual double measure_read_bandwidth() = 0;
  /// Operations per second, two for each multiply-add, of the arithmetic that bounds experts with
  /// many rows, measured now: FP8 tensor cores on CUDA, byte dot products of all threads on a CPU.
  [[nodiscard]] virtual double measure_arithmetic_rate() = 0;

  /// Throws: kOutOfMemory. Contents unspecified.
  [[nodiscard]] virtual std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes) = 0;
  /// A queue of this backend's own, for callers that bring none. Lives as long as the backend.
  [[nodiscard]] virtual Stream stream() { return {}; }
  /// Copies between this device and host memory, ordered on `stream`; return when done.
  virtual void copy_to_host(void* host, const void* device, std::size_t bytes, Stream stream) = 0;
  virtual void copy_from_host(void* device, const void* host, std::size_t bytes, Stream stream) = 0;
  /// Copies within this device, ordered on `stream`; asynchronous where it has streams.
  virtual void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream) = 0;
  /// Waits for everything queued on `stream`. A no-op where operations return when done.
  virtual void synchronize(Stream stream) { (void)stream; }
};

/// The error a backend may make in each GEMM output, beyond what its inputs already carry.
struct ErrorModel {
  /// Of float32 sums: this times sum |a * w|.
  double accumulation = 0x1p-20;
  /// Of tensor cores, which add 32 products at a time: all of them and the running sum are aligned
  /// to the largest exponent E, and bits below `alignment` * 2^E are dropped, as are those of the
  /// new sum below `alignment` times itself. 0: products are summed as float32 or exactly.
  /// docs/design.md#arithmetic derives what follows for a row.
  double alignment = 0;
};
/// What backends of this kind keep to; a device is not needed. Throws: kInvalidArgument.
[[nodiscard]] ErrorModel error_model(Device::Kind kind);

/// Devices of this kind that the process sees: 1 for the host, 0 without CUDA.
[[nodiscard]] int num_devices(Device::Kind kind) noexcept;

/// The device of rank `local_rank`, and its share of it, if this machine's `num_local_ranks` ranks
/// spread evenly over its first `devices` devices (0 = all). Rank i gets device i modulo their
/// number. Throws: kInvalidArgument naming the number and the limit.
[[nodiscard]] BackendConfig place_rank(Device::Kind kind, int local_rank, int num_local_ranks,
                                       int devices = 0);

/// Throws: kInvalidArgument, kUnsupported (a CUDA device in a build or on a machine without one).
[[nodiscard]] std::unique_ptr<Backend> make_backend(const BackendConfig& config);

}  // namespace sluice
