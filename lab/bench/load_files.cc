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

}  // namespace

LoadFiles::LoadFiles(std::span<const std::unique_ptr<ExpertReader>> readers) {
  for (const auto& reader : readers) {
    bytes_ += reader->file_bytes();
    for (int e = 0; e < static_cast<int>(reader->shapes().experts.size()); ++e) {
      for (const MatrixRole role : kRoles) matrices_.push_back({reader->tensors(e, role)});
    }
  }
}

double LoadFiles::read(int num_threads) const {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  std::vector<std::vector<std::byte>> memories;
  for (int t = 0; t < num_threads; ++t) memories.emplace_back(ExpertReader::kPieceBytes);
  const auto work = [&](std::span<std::byte> memory) {
    try {
      for (std::size_t i; (i = next++) < matrices_.size();) {
        for (const TensorRef& tensor : matrices_[i].tensors) {
          for (std::size_t at = 0; at < tensor.size(); at += memory.size()) {
            const auto piece = memory.first(std::min(memory.size(), tensor.size() - at));
            if (tensor.file->read(tensor.data_begin + tensor.entry.begin + at, piece) <
                piece.size()) {
              fail(ErrorCode::kCorruptFile, "{}: cut since it was opened", place(tensor));
            }
          }
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
