// Every thread takes the next half of an expert and goes all the way with it.
#include "engine/expert_loader.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/fail.h"

namespace sluice {
namespace {

/// Below 4, reads of a disk are not queued deep enough; above 16, each holds host memory for
/// little.
constexpr int kLeastThreads = 4, kMostThreads = 16, kThreadLimit = 256;
constexpr std::chrono::milliseconds kProgressEvery{100};

/// One reader's experts and what becomes of them.
struct Target {
  ExpertReader* reader;
  std::unique_ptr<ExpertBuilder> builder = {};  ///< Made while the targets before it are read.
  std::size_t num_jobs = 0;                     ///< Two for each expert: gate and up, down.
};

/// One load: its threads, and how far they are.
class Load {
 public:
  Load(BackendOps& backend, std::span<Target> targets, int num_threads);
  ~Load() { stop(); }
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;

  /// Takes memory for the experts of every target, one target after the other, while threads read
  /// the first ones already: the device takes some milliseconds for a layer's.
  void make_builders();
  /// Returns when everything before the end of target `index` has been read and handed on.
  /// Throws: the failure that comes first in the order of the experts; what `progress` throws.
  void wait_for(std::size_t index, const Progress& progress);
  /// Returns when every thread has ended.   Throws: as wait_for().
  void wait();

  [[nodiscard]] std::size_t host_bytes() const noexcept { return host_bytes_; }
  [[nodiscard]] int num_threads() const noexcept { return static_cast<int>(threads_.size()); }

 private:
  void work() noexcept;
  /// False if there will be none, or if the load has failed.
  [[nodiscard]] bool wait_for_builder(std::size_t index);
  void run_job(std::size_t job, ExpertPacker& packer, std::span<std::byte> spare);
  void count_job(std::size_t job) noexcept;
  /// Of the exception that is handled. Jobs that nobody has taken yet are left undone if it stops.
  void keep_error(std::size_t job, bool stops) noexcept;
  [[nodiscard]] std::size_t target_of(std::size_t& job) const noexcept;
  void stop() noexcept;
  [[nodiscard]] double fraction_read() const noexcept;

  BackendOps& backend_;
  std::span<Target> targets_;
  PackerSizes sizes_;
  std::size_t num_jobs_ = 0;
  std::atomic<std::size_t> end_job_{0};  ///< Jobs from here on have no builder and never will.
  std::uint64_t file_bytes_ = 0;
  std::atomic<std::size_t> next_job_{0}, host_bytes_{0};
  std::atomic<bool> stopping_{false};

  std::mutex mutex_;
  std::condition_variable changed_, builder_made_;
  std::size_t num_builders_ = 0;
  std::vector<std::size_t> jobs_left_;  ///< Of each target.
  int num_running_ = 0;
  std::size_t failed_job_ = 0;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

Load::Load(BackendOps& backend, std::span<Target> targets, int num_threads)
    : backend_(backend), targets_(targets) {
  for (const Target& t : targets_) {
    sizes_.piece_bytes = std::max(sizes_.piece_bytes, t.reader->piece_bytes());
    sizes_.scales_bytes = std::max(sizes_.scales_bytes, t.reader->scales_bytes());
    sizes_.codes_bytes = std::max(sizes_.codes_bytes, t.reader->codes_bytes());
    file_bytes_ += t.reader->file_bytes();
    num_jobs_ += t.num_jobs;
    jobs_left_.push_back(t.num_jobs);
  }
  end_job_ = num_jobs_;
  const auto wanted = std::min(num_jobs_, static_cast<std::size_t>(num_threads));
  num_running_ = static_cast<int>(wanted);
  try {
    while (threads_.size() < wanted) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error& e) {
    stop();
    fail(ErrorCode::kInternal, "cannot start thread {} of {}: {}", threads_.size() + 1, wanted,
         e.what());
  }
}

/// A target without a builder fails as its first job would, so that jobs before it still run.
void Load::make_builders() {
  std::size_t first_job = 0;
  for (Target& target : targets_) {
    bool is_made = false;
    try {
      target.builder = backend_.make_builder(target.reader->shapes());
      is_made = true;
    } catch (...) {
      keep_error(first_job, false);
    }
    {
      const std::lock_guard lock(mutex_);
      is_made ? void(++num_builders_) : void(end_job_ = first_job);
    }
    builder_made_.notify_all();
    if (!is_made) return;
    first_job += target.num_jobs;
  }
}

bool Load::wait_for_builder(std::size_t index) {
  std::unique_lock lock(mutex_);
  const auto is_over = [&] { return index < num_builders_ || end_job_ < num_jobs_ || stopping_; };
  builder_made_.wait(lock, is_over);
  return index < num_builders_;
}

void Load::stop() noexcept {
  {
    const std::lock_guard lock(mutex_);  // Nobody is between a look at it and a wait.
    stopping_ = true;
  }
  builder_made_.notify_all();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void Load::keep_error(std::size_t job, bool stops) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (stops) stopping_ = true;
    if (!error_ || job <= failed_job_) {
      error_ = std::current_exception();
      failed_job_ = job;
    }
  }
  builder_made_.notify_all();
}

std::size_t Load::target_of(std::size_t& job) const noexcept {
  std::size_t index = 0;
  while (job >= targets_[index].num_jobs) job -= targets_[index++].num_jobs;
  return index;
}

/// Jobs are taken in order and not abandoned. So the first one that fails always runs, and the
/// error does not depend on which thread was faster.
void Load::work() noexcept {
  std::size_t job = 0;
  try {
    const std::unique_ptr<ExpertPacker> packer = backend_.make_packer(sizes_);
    // Touched by formats alone that put rows into another order.
    const std::unique_ptr<std::byte[]> spare(new std::byte[sizes_.piece_bytes]);
    host_bytes_ += packer->host_bytes() + sizes_.piece_bytes;
    while (!stopping_) {
      job = next_job_++;
      if (job >= end_job_) break;
      std::size_t job_of_target = job;
      if (!wait_for_builder(target_of(job_of_target))) break;
      run_job(job, *packer, {spare.get(), sizes_.piece_bytes});
      count_job(job);
    }
    packer->flush();
  } catch (...) {
    keep_error(job, true);
  }
  {
    const std::lock_guard lock(mutex_);
    --num_running_;
  }
  changed_.notify_one();
}

void Load::count_job(std::size_t job) noexcept {
  const std::size_t index = target_of(job);
  {
    const std::lock_guard lock(mutex_);
    if (--jobs_left_[index] > 0) return;
  }
  changed_.notify_one();
}

void Load::run_job(std::size_t job, ExpertPacker& packer, std::span<std::byte> spare) {
  const Target* const target = &targets_[target_of(job)];
  const int expert = static_cast<int>(job / 2);
  const auto move = [&](MatrixRole role) {
    ExpertReader& reader = *target->reader;
    packer.add_scales(*target->builder, expert, role,
                      reader.read_scales(expert, role, packer.next_scales()));
    if (reader.shapes().geometry.has_bias) {
      packer.add_bias(*target->builder, expert, role, reader.read_bias(expert, role));
    }
    const QuantMatrix& matrix =
        reader.shapes().experts[static_cast<std::size_t>(expert)].matrix(role);
    for (std::int64_t row = 0; row < matrix.n(); row += reader.piece_rows(role)) {
      const std::int64_t rows = std::min(reader.piece_rows(role), matrix.n() - row);
      const auto piece = packer.next_piece().first(static_cast<std::size_t>(rows * matrix.k() / 2));
      reader.read_rows(expert, role, row, piece, spare);
      packer.add_rows(piece);
    }
  };
  if (job % 2 == 0) {
    move(MatrixRole::kGate);
    move(MatrixRole::kUp);
  } else {
    move(MatrixRole::kDown);
  }
}

double Load::fraction_read() const noexcept {
  std::uint64_t read = 0;
  for (const Target& t : targets_) read += t.reader->bytes_read();
  return static_cast<double>(read) / static_cast<double>(std::max<std::uint64_t>(file_bytes_, 1));
}

void Load::wait_for(std::size_t index, const Progress& progress) {
  std::unique_lock lock(mutex_);
  // After a failure the jobs before it still end, and one of them may fail as well.
  const auto is_over = [&] { return (jobs_left_[index] == 0 && !error_) || num_running_ == 0; };
  while (progress && !changed_.wait_for(lock, kProgressEvery, is_over)) {
    lock.unlock();
    progress(fraction_read());
    lock.lock();
  }
  changed_.wait(lock, is_over);
  if (error_) std::rethrow_exception(error_);
}

void Load::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return num_running_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

int threads_for(const BackendOps& backend, const LoadOptions& options) {
  check_argument(options.num_threads >= 0 && options.num_threads <= kThreadLimit,
                 "num_threads {} is not in [0, {}]", options.num_threads, int{kThreadLimit});
  if (options.num_threads > 0) return options.num_threads;
  return std::clamp(backend.num_host_threads(), int{kLeastThreads}, int{kMostThreads});
}

}  // namespace

std::vector<std::unique_ptr<PreparedExperts>> load_prepared(
    BackendOps& backend, std::span<const std::unique_ptr<ExpertReader>> readers,
    const LoadOptions& options, LoadStats& stats, const OnRead& on_read) {
  const int num_threads = threads_for(backend, options);
  const auto begin = std::chrono::steady_clock::now();
  std::vector<Target> targets;
  for (const auto& reader : readers) {
    targets.push_back({.reader = reader.get(), .num_jobs = 2 * reader->shapes().experts.size()});
  }
  LoadStats mine;
  {
    Load load(backend, targets, num_threads);
    load.make_builders();
    for (std::size_t i = 0; i < targets.size(); ++i) {
      load.wait_for(i, options.progress);
      if (on_read) on_read(i);
    }
    load.wait();
    if (options.progress) options.progress(1.0);
    mine.num_threads = load.num_threads();
    mine.host_bytes = load.host_bytes();
  }
  std::vector<std::unique_ptr<PreparedExperts>> prepared;
  for (Target& target : targets) {
    prepared.push_back(target.builder->finish());
    mine.file_bytes += target.reader->bytes_read();
    mine.prepared_bytes += prepared.back()->bytes();
  }
  mine.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  stats.add(mine);
  return prepared;
}

void LoadStats::add(const LoadStats& other) noexcept {
  seconds += other.seconds;
  file_bytes += other.file_bytes;
  prepared_bytes += other.prepared_bytes;
  host_bytes = std::max(host_bytes, other.host_bytes);
  num_threads = std::max(num_threads, other.num_threads);
}

}  // namespace sluice
