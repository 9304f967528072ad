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
  std::unique_ptr<ExpertBuilder> builder;
  std::size_t num_jobs;  ///< Two for each expert: gate and up, down.
};

/// One load: its threads, and how far they are.
class Load {
 public:
  Load(BackendOps& backend, std::span<const Target> targets, int num_threads);
  ~Load() { stop(); }
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;

  /// Returns when everything before the end of target `index` has been read and handed on.
  /// Throws: the failure that comes first in the order of the experts; what `progress` throws.
  void wait_for(std::size_t index, const Progress& progress);
  /// Returns when every thread has ended.   Throws: as wait_for().
  void wait();

  [[nodiscard]] std::size_t host_bytes() const noexcept { return host_bytes_; }
  [[nodiscard]] int num_threads() const noexcept { return static_cast<int>(threads_.size()); }

 private:
  void work() noexcept;
  void run_job(std::size_t job, ExpertPacker& packer, std::span<std::byte> spare);
  void count_job(std::size_t job) noexcept;
  void keep_error(std::size_t job) noexcept;
  void stop() noexcept;
  [[nodiscard]] double fraction_read() const noexcept;

  BackendOps& backend_;
  std::span<const Target> targets_;
  PackerSizes sizes_;
  std::size_t num_jobs_ = 0;
  std::uint64_t file_bytes_ = 0;
  std::atomic<std::size_t> next_job_{0}, host_bytes_{0};
  std::atomic<bool> stopping_{false};

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::size_t> jobs_left_;  ///< Of each target.
  int num_running_ = 0;
  std::size_t failed_job_ = 0;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

Load::Load(BackendOps& backend, std::span<const Target> targets, int num_threads)
    : backend_(backend), targets_(targets) {
  for (const Target& t : targets_) {
    sizes_.piece_bytes = std::max(sizes_.piece_bytes, t.reader->piece_bytes());
    sizes_.scales_bytes = std::max(sizes_.scales_bytes, t.reader->scales_bytes());
    sizes_.codes_bytes = std::max(sizes_.codes_bytes, t.reader->codes_bytes());
    file_bytes_ += t.reader->file_bytes();
    num_jobs_ += t.num_jobs;
    jobs_left_.push_back(t.num_jobs);
  }
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

void Load::stop() noexcept {
  stopping_ = true;
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void Load::keep_error(std::size_t job) noexcept {
  stopping_ = true;
  const std::lock_guard lock(mutex_);
  if (error_ && failed_job_ < job) return;
  error_ = std::current_exception();
  failed_job_ = job;
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
      if (job >= num_jobs_) break;
      run_job(job, *packer, {spare.get(), sizes_.piece_bytes});
      count_job(job);
    }
    packer->flush();
  } catch (...) {
    keep_error(job);
  }
  {
    const std::lock_guard lock(mutex_);
    --num_running_;
  }
  changed_.notify_one();
}

void Load::count_job(std::size_t job) noexcept {
  std::size_t index = 0;
  while (job >= targets_[index].num_jobs) job -= targets_[index++].num_jobs;
  {
    const std::lock_guard lock(mutex_);
    if (--jobs_left_[index] > 0) return;
  }
  changed_.notify_one();
}

void Load::run_job(std::size_t job, ExpertPacker& packer, std::span<std::byte> spare) {
  const Target* target = targets_.data();
  while (job >= target->num_jobs) job -= (target++)->num_jobs;
  const int expert = static_cast<int>(job / 2);
  const auto move = [&](MatrixRole role) {
    ExpertReader& reader = *target->reader;
    packer.add_scales(*target->builder, expert, role,
                      reader.read_scales(expert, role, packer.next_scales()));
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
    targets.push_back({.reader = reader.get(),
                       .builder = backend.make_builder(reader->shapes()),
                       .num_jobs = 2 * reader->shapes().experts.size()});
  }
  LoadStats mine;
  {
    Load load(backend, targets, num_threads);
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
