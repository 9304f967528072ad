#include "core/mmap.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

std::uintptr_t page_bytes() noexcept {
  static const auto kBytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  return kBytes;
}

/// All mappings of the process. Whoever has the lock touches nothing that is mapped, so a thread
/// that faults does not have it, and waits for a few instructions of another at most.
std::atomic_flag list_lock;
MappedFile* list_head = nullptr;

void lock_list() noexcept {
  while (list_lock.test_and_set(std::memory_order_acquire)) {
  }
}

void unlock_list() noexcept {
  list_lock.clear(std::memory_order_release);
}

/// In the child of a fork, whoever had the lock may not be there.
[[maybe_unused]] const int kAtFork = pthread_atfork(lock_list, unlock_list, unlock_list);

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  RegularFile file = RegularFile::open(path);
  const auto size = static_cast<std::size_t>(file.bytes);
  std::span<const std::byte> bytes;
  if (size > 0) {
    void* const address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.descriptor.get(), 0);
    if (address == MAP_FAILED) {
      fail(ErrorCode::kIo, "{}: cannot map {} bytes: {}", path.string(), size,
           std::strerror(errno));
    }
    (void)::madvise(address, size, MADV_RANDOM);
    bytes = {static_cast<const std::byte*>(address), size};
  }
  return std::shared_ptr<const MappedFile>(new MappedFile(path, std::move(file), bytes));
}

MappedFile::MappedFile(std::filesystem::path path, RegularFile file,
                       std::span<const std::byte> bytes) noexcept
    : path_(std::move(path)), file_(std::move(file)), bytes_(bytes) {
  lock_list();
  next_ = list_head;
  if (next_ != nullptr) next_->previous_ = this;
  list_head = this;
  unlock_list();
}

MappedFile::~MappedFile() {
  lock_list();
  (previous_ != nullptr ? previous_->next_ : list_head) = next_;
  if (next_ != nullptr) next_->previous_ = previous_;
  unlock_list();
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

bool MappedFile::contains(const void* data, std::size_t size) const noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes_.data());
  const auto at = reinterpret_cast<std::uintptr_t>(data);
  return at >= begin && size <= bytes_.size() && at - begin <= bytes_.size() - size;
}

std::size_t MappedFile::read(std::uint64_t at, std::span<std::byte> out) const {
  // Around a header or a scale lie bytes of experts that belong to other ranks.
  constexpr std::size_t kAlone = std::size_t{64} << 10;
  if (out.size() > kAlone) return file_.read(at, out, path_);
  (void)::posix_fadvise(file_.descriptor.get(), 0, 0, POSIX_FADV_RANDOM);
  const std::size_t got = file_.read(at, out, path_);
  (void)::posix_fadvise(file_.descriptor.get(), 0, 0, POSIX_FADV_NORMAL);
  return got;
}

std::uint64_t MappedFile::bytes_now() const noexcept {
  struct stat status {};
  if (::fstat(file_.descriptor.get(), &status) != 0) return 0;
  return static_cast<std::uint64_t>(status.st_size);
}

void MappedFile::check_is_whole() const {
  const std::uint64_t now = bytes_now();
  if (now >= bytes_.size()) return;
  fail(ErrorCode::kCorruptFile,
       "{}: {} of its {} bytes are left: it has been cut since it was opened", path_.string(), now,
       bytes_.size());
}

MappedFile::Found MappedFile::find(const void* address) noexcept {
  Found found;
  lock_list();
  for (const MappedFile* file = list_head; file != nullptr; file = file->next_) {
    if (!file->contains(address, 1)) continue;
    found = {.file = file, .bytes_now = file->bytes_now()};
    break;
  }
  unlock_list();
  return found;
}

void MappedFile::will_need(std::span<const std::byte> part) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(part.data());
  const std::uintptr_t begin = address / page_bytes() * page_bytes();
  if (part.empty()) return;
  (void)::madvise(reinterpret_cast<void*>(begin), address + part.size() - begin, MADV_WILLNEED);
}

void MappedFile::release(std::span<const std::byte> part) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(part.data());
  const std::uintptr_t begin = (address + page_bytes() - 1) / page_bytes() * page_bytes();
  const std::uintptr_t end = (address + part.size()) / page_bytes() * page_bytes();
  if (end > begin) (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace sluice
