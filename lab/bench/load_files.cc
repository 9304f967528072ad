#include "load_files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "core/fail.h"
#include "core/file_descriptor.h"

namespace sluice {
namespace {

constexpr MatrixRole kRoles[] = {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown};

/// Memory that nobody has touched, of huge pages where there are any: as experts have it.
class NewMemory {
 public:
  explicit NewMemory(std::size_t size) {
    void* const data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) {
      fail(ErrorCode::kOutOfMemory, "cannot map {} bytes: {}", size, std::strerror(errno));
    }
    (void)::madvise(data, size, MADV_HUGEPAGE);  // A hint; may be refused.
    bytes_ = {static_cast<std::byte*>(data), size};
  }
  ~NewMemory() { ::munmap(bytes_.data(), bytes_.size()); }
  NewMemory(const NewMemory&) = delete;
  NewMemory& operator=(const NewMemory&) = delete;
  [[nodiscard]] std::span<std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::span<std::byte> bytes_;
};

}  // namespace

LoadFiles::LoadFiles(std::span<const std::unique_ptr<ExpertReader>> readers) {
  std::uint64_t begin = 0;
  for (const auto& reader : readers) {
    bytes_ += reader->file_bytes();
    for (int e = 0; e < static_cast<int>(reader->shapes().experts.size()); ++e) {
      for (const MatrixRole role : kRoles) {
        matrices_.push_back({.tensors = reader->tensors(e, role), .begin = begin});
        for (const TensorRef& tensor : matrices_.back().tensors) begin += tensor.size();
      }
    }
  }
}

double LoadFiles::read_and_keep(int num_threads) const {
  const Matrix& last = matrices_.back();
  std::uint64_t bytes = last.begin;
  for (const TensorRef& tensor : last.tensors) bytes += tensor.size();
  const NewMemory memory(bytes);
  return read_into(num_threads, memory.bytes());
}

double LoadFiles::read_into(int num_threads, std::span<std::byte> all) const {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  std::vector<std::vector<std::byte>> memories;
  for (int t = 0; t < num_threads; ++t) memories.emplace_back(ExpertReader::kPieceBytes);
  const auto work = [&](std::span<std::byte> memory) {
    try {
      for (std::size_t i; (i = next++) < matrices_.size();) {
        std::uint64_t begin = matrices_[i].begin;
        for (const TensorRef& tensor : matrices_[i].tensors) {
          for (std::size_t at = 0; at < tensor.size(); at += memory.size()) {
            const std::size_t size = std::min(memory.size(), tensor.size() - at);
            const auto piece = all.empty() ? memory.first(size) : all.subspan(begin + at, size);
            if (tensor.file->read(tensor.data_begin + tensor.entry.begin + at, piece) <
                piece.size()) {
              fail(ErrorCode::kCorruptFile, "{}: cut since it was opened", place(tensor));
            }
          }
          begin += tensor.size();
        }
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  };
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t)
    threads.emplace_back(work, std::span(memories[static_cast<std::size_t>(t)]));
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  if (error) std::rethrow_exception(error);
  return static_cast<double>(bytes_) / seconds.count();
}

void LoadFiles::drop() const {
  std::map<std::filesystem::path, bool> done;
  for (const Matrix& matrix : matrices_) {
    for (const TensorRef& tensor : matrix.tensors) {
      if (!done.emplace(tensor.file->path(), true).second) continue;
      const FileDescriptor file(::open(tensor.file->path().c_str(), O_RDONLY | O_CLOEXEC));
      if (!file) {
        fail(ErrorCode::kIo, "{}: cannot open: {}", tensor.file->path().string(),
             std::strerror(errno));
      }
      (void)::fdatasync(file.get());  // Pages that are not written yet cannot be forgotten.
      (void)::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
    }
  }
}

double LoadFiles::cached_share() const {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::size_t num_pages = 0, num_cached = 0;
  std::vector<unsigned char> flags;
  for (const Matrix& matrix : matrices_) {
    for (const TensorRef& tensor : matrix.tensors) {
      const std::span<const std::byte> bytes = tensor.bytes();
      const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
      const std::uintptr_t begin = (address + page - 1) / page * page;
      const std::uintptr_t end = (address + bytes.size()) / page * page;
      if (end <= begin) continue;
      flags.resize((end - begin) / page);
      if (::mincore(reinterpret_cast<void*>(begin), end - begin, flags.data()) != 0) {
        fail(ErrorCode::kIo, "{}: mincore: {}", place(tensor), std::strerror(errno));
      }
      num_pages += flags.size();
      num_cached += static_cast<std::size_t>(
          std::ranges::count_if(flags, [](unsigned char f) { return (f & 1) != 0; }));
    }
  }
  return num_pages > 0 ? static_cast<double>(num_cached) / static_cast<double>(num_pages) : 1;
}

}  // namespace sluice
