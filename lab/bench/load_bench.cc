// Checked first, then timed: plain reads of the same tensors, the copy to the device, the load.
#include "sluice/lab/load_bench.h"

#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <string>
#include <thread>

#include "backend/ops.h"
#include "checkpoint/expert_reader.h"
#include "core/fail.h"
#include "load_files.h"
#include "sluice/lab/median.h"
#include "sluice/local_experts.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Anonymous memory of this process.
std::size_t anonymous_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word != "RssAnon:") continue;
    std::size_t kilobytes = 0;
    status >> kilobytes;
    return kilobytes << 10;
  }
  return 0;
}

/// Watches how far anonymous memory grows while it lives.
class MemoryWatch {
 public:
  MemoryWatch() : before_(anonymous_bytes()), most_(before_), thread_([this] { watch(); }) {}
  ~MemoryWatch() { stop(); }
  MemoryWatch(const MemoryWatch&) = delete;
  MemoryWatch& operator=(const MemoryWatch&) = delete;
  std::size_t growth() {
    stop();
    return most_ - before_;
  }

 private:
  void watch() {
    while (!stopping_) {
      most_ = std::max(most_, anonymous_bytes());
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    most_ = std::max(most_, anonymous_bytes());
  }
  void stop() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
  }

  std::size_t before_, most_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

/// One bench: what to load, and where to.
class LoadBench {
 public:
  LoadBench(const LoadBenchConfig& config, const Checkpoint& checkpoint, Backend& backend)
      : config_(config), checkpoint_(checkpoint), backend_(backend) {
    const ModelGeometry& g = checkpoint.geometry();
    check_argument(!config.layers.empty(), "no layer to load");
    check_argument(config.num_ranks >= 1 && g.num_experts % config.num_ranks == 0,
                   "{} experts are not divisible by {} ranks", g.num_experts, config.num_ranks);
    check_argument(config.rank >= 0 && config.rank < config.num_ranks, "rank {} is not in [0, {})",
                   config.rank, config.num_ranks);
    check_argument(config.repeats >= 1, "repeats {} is not positive", config.repeats);
    count_ = g.num_experts / config.num_ranks;
    first_ = config.rank * count_;
    for (const int layer : config.layers) {
      readers_.push_back(std::make_unique<ExpertReader>(checkpoint, layer, first_, count_));
    }
  }

  LoadBenchReport run(const std::function<void(double)>& on_progress);

 private:
  [[nodiscard]] LocalGroup make_group() {
    const ModelGeometry& g = checkpoint_.geometry();
    return LocalGroup::create(
        {.hidden = g.hidden, .intermediate = g.intermediate, .max_entries = 1}, backend_);
  }
  /// Loads `layers` and drops them.
  LoadStats load(std::span<const int> layers) {
    LocalGroup group = make_group();
    (void)group.add_layers(checkpoint_, layers, first_, count_, {},
                           {.num_threads = config_.num_threads});
    return group.load_stats();
  }
  void check(const std::function<void(double)>& on_progress);
  [[nodiscard]] double measure_copy();
  [[nodiscard]] LoadBenchPass pass(const LoadFiles& files, bool is_cold);

  const LoadBenchConfig& config_;
  const Checkpoint& checkpoint_;
  Backend& backend_;
  int first_ = 0, count_ = 0;
  std::vector<std::unique_ptr<ExpertReader>> readers_;
  LoadBenchReport report_;
};

/// Layer by layer, so that two of them are held at most.
void LoadBench::check(const std::function<void(double)>& on_progress) {
  for (std::size_t i = 0; i < config_.layers.size(); ++i) {
    LocalGroup group = make_group();
    const int layer = config_.layers[i];
    const auto loaded = group.add_layers(checkpoint_, std::span(&layer, 1), first_, count_, {},
                                         {.num_threads = config_.num_threads});
    const LocalExperts mapped = group.add_layer(checkpoint_.load_experts(layer, first_, count_));
    const std::uint64_t digest = loaded[0].weight_digest();
    if (digest != mapped.weight_digest()) {
      fail(ErrorCode::kInternal,
           "layer {}: the prepared experts of a load differ from those that were mapped", layer);
    }
    report_.digest = report_.digest * 0x100000001b3U ^ digest;
    if (on_progress) {
      on_progress(0.5 * static_cast<double>(i + 1) / static_cast<double>(config_.layers.size()));
    }
  }
}

/// From one thread's slot, in pieces of its size.
double LoadBench::measure_copy() {
  if (backend_.device().kind == Device::Kind::kHost) return 0;
  constexpr std::size_t kPiece = std::size_t{64} << 20;
  constexpr int kPieces = 16;
  const auto packer = ops(backend_).make_packer({.piece_bytes = kPiece});
  const std::span<std::byte> slot = packer->next_piece();
  const auto buffer = backend_.allocate(kPiece);
  std::vector<double> rates;
  for (int i = 0; i < kPieces; ++i) {
    const auto begin = Clock::now();
    backend_.copy_from_host(buffer->data(), slot.data(), kPiece, backend_.stream());
    rates.push_back(static_cast<double>(kPiece) / seconds_since(begin));
  }
  return median(rates);
}

LoadBenchPass LoadBench::pass(const LoadFiles& files, bool is_cold) {
  LoadBenchPass pass{.is_cold = is_cold};
  const bool is_host = backend_.device().kind == Device::Kind::kHost;
  std::vector<double> reads, kept_reads, loads;
  const int repeats = is_cold ? 1 : config_.repeats;
  for (int i = 0; i < repeats; ++i) {
    if (is_cold) files.drop();
    pass.cached_share = std::max(pass.cached_share, is_cold ? files.cached_share() : 0);
    reads.push_back(files.read(report_.num_threads));
    if (is_cold) files.drop();
    if (is_host) {
      kept_reads.push_back(files.read_and_keep(report_.num_threads));
      if (is_cold) files.drop();
    }
    pass.cached_share = std::max(pass.cached_share, files.cached_share());
    MemoryWatch watch;
    const LoadStats stats = load(config_.layers);
    const std::size_t grown = watch.growth();
    const std::size_t kept = is_host ? stats.prepared_bytes : 0;
    report_.host_growth_bytes =
        std::max(report_.host_growth_bytes, grown > kept ? grown - kept : 0);
    loads.push_back(stats.seconds);
  }
  pass.read_bytes_per_s = median(reads);
  if (is_host) pass.kept_read_bytes_per_s = median(kept_reads);
  pass.load_seconds = median(loads);
  pass.load_bytes_per_s = static_cast<double>(report_.file_bytes) / pass.load_seconds;
  return pass;
}

LoadBenchReport LoadBench::run(const std::function<void(double)>& on_progress) {
  report_.device = backend_.description();
  report_.num_experts = count_;
  // One layer tells the threads, and locks the memory that later loads use again.
  const LoadStats first = load(std::span(config_.layers).first(1));
  report_.first_load_seconds = first.seconds;
  report_.num_threads = first.num_threads;
  report_.slots_bytes = first.host_bytes;
  if (config_.with_check) check(on_progress);
  const LoadFiles files(readers_);
  report_.file_bytes = files.bytes();
  report_.copy_bytes_per_s = measure_copy();
  if (config_.with_cold) {
    files.drop();
    // Memory file systems, and pages that somebody else has mapped, stay.
    if (const double cached = files.cached_share(); cached > 0.02) {
      report_.without_cold = fmt::format(
          "{:.0f} % of the bytes stay in memory when the system is asked to forget them",
          100 * cached);
    } else {
      report_.passes.push_back(pass(files, true));
    }
  }
  if (on_progress) on_progress(0.75);
  (void)files.read(report_.num_threads);
  report_.passes.push_back(pass(files, false));
  report_.prepared_bytes = first.prepared_bytes * config_.layers.size();
  return std::move(report_);
}

}  // namespace

double LoadBenchReport::bound(const LoadBenchPass& pass) const noexcept {
  const double to_device = copy_bytes_per_s > 0 ? copy_bytes_per_s : pass.kept_read_bytes_per_s;
  return std::min(pass.read_bytes_per_s, to_device);
}

LoadBenchReport bench_load(const LoadBenchConfig& config, const Checkpoint& checkpoint,
                           Backend& backend, const std::function<void(double)>& on_progress) {
  return LoadBench(config, checkpoint, backend).run(on_progress);
}

}  // namespace sluice
