// A rank reads its own experts' bytes and no others: shown by what the values of others may be, and
// by which pages of the file are in memory afterwards.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "checkpoint/safetensors.h"
#include "core/mmap.h"
#include "expect_error.h"
#include "model_files.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::ModelFiles;
using testing::TempDir;

constexpr int kLayer = 3;

TEST(Locality, BadScalesOfOtherExpertsAreNotSeen) {
  const TempDir dir;
  ModelFiles files;
  for (const char* stem : {"gate_proj", "up_proj", "down_proj"}) {
    auto& scales = files.tensor(1, std::string(stem) + ".weight_scale_inv").bytes;
    scales = testing::f32_bytes(std::vector<float>(scales.size() / 4, std::nanf("")));
  }
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  EXPECT_EQ(checkpoint.load_experts(ModelFiles::kLayer, 0, 1).experts.size(), 1U);
  expect_error(ErrorCode::kCorruptFile, {"experts.1.gate_proj.weight_scale_inv", "nan"},
               [&] { (void)checkpoint.load_experts(ModelFiles::kLayer, 1, 1); });
}

/// Which pages of a file the system holds in memory.
class PageCache {
 public:
  explicit PageCache(const std::filesystem::path& path)
      : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)), bytes_(std::filesystem::file_size(path)) {}
  ~PageCache() { ::close(fd_); }
  PageCache(const PageCache&) = delete;
  PageCache& operator=(const PageCache&) = delete;

  /// Empties it, as far as the file system lets us.
  void drop() const {
    ::fdatasync(fd_);
    ::posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
  }
  [[nodiscard]] std::vector<bool> resident() const {
    const std::size_t num_pages = (bytes_ + page_bytes() - 1) / page_bytes();
    std::vector<unsigned char> flags(num_pages);
    void* const address = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, fd_, 0);
    if (address == MAP_FAILED) throw std::runtime_error("mmap failed");
    const int status = ::mincore(address, bytes_, flags.data());
    ::munmap(address, bytes_);
    if (status != 0) throw std::runtime_error("mincore failed");
    std::vector<bool> result(num_pages);
    for (std::size_t i = 0; i < num_pages; ++i) result[i] = (flags[i] & 1) != 0;
    return result;
  }
  [[nodiscard]] static std::size_t page_bytes() {
    return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  }

 private:
  int fd_;
  std::size_t bytes_;
};

/// Pages of `path` that hold a byte of its header or of an expert in [first, last].
std::vector<bool> pages_of(const std::filesystem::path& path, int first, int last) {
  const auto file = MappedFile::open(path);
  const auto header = parse_safetensors_header(file->bytes(), path.string());
  const std::size_t page = PageCache::page_bytes();
  std::vector<bool> pages((file->bytes().size() + page - 1) / page);
  const auto mark = [&](std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t p = begin / page; p <= (end - 1) / page; ++p) pages[p] = true;
  };
  mark(0, header.data_begin);
  for (const SafetensorsEntry& t : header.tensors) {
    for (int e = first; e <= last; ++e) {
      if (t.name.find(".experts." + std::to_string(e) + ".") == std::string::npos) continue;
      mark(header.data_begin + t.begin, header.data_begin + t.end);
    }
  }
  return pages;
}

std::int64_t sum_bytes(const ExpertWeights& weights) {
  std::int64_t sum = 0;
  for (const Expert& expert : weights.experts) {
    for (const QuantMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
      const auto* codes = m->codes.as<std::uint8_t>();
      sum = std::accumulate(codes, codes + m->codes.bytes(), sum);
    }
  }
  return sum;
}

TEST(Locality, OnlyOwnPagesComeIntoMemory) {
  const TempDir dir;
  ModelGeometry geometry = preset_geometry("tiny");
  geometry.hidden = 2048;
  geometry.intermediate = 1024;
  write_synthetic_checkpoint({.geometry = geometry}, dir / "model");
  const auto path = dir / "model" / "model-00001-of-00001.safetensors";
  ASSERT_GT(std::filesystem::file_size(path), std::size_t{20} << 20);
  const std::vector<bool> expected = pages_of(path, 2, 3);

  const PageCache cache(path);
  cache.drop();
  for (const bool is_resident : cache.resident()) {
    if (is_resident) GTEST_SKIP() << "this file system does not give its pages back";
  }
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  const ExpertWeights weights = checkpoint.load_experts(kLayer, 2, 2);
  EXPECT_GT(sum_bytes(weights), 0);

  const std::vector<bool> resident = cache.resident();
  std::size_t num_missing = 0, num_foreign = 0, num_own = 0;
  for (std::size_t i = 0; i < resident.size(); ++i) {
    num_own += expected[i];
    num_missing += expected[i] && !resident[i];
    num_foreign += !expected[i] && resident[i];
  }
  RecordProperty("own_pages", static_cast<int>(num_own));
  RecordProperty("foreign_pages", static_cast<int>(num_foreign));
  EXPECT_EQ(num_foreign, 0U) << "of " << resident.size() << " pages, " << num_own << " own";
  EXPECT_EQ(num_missing, 0U);
}

/// Bytes of `part` that are mapped into this process: Rss of its range in smaps would be the direct
/// measure; the process total is good enough for a difference of megabytes.
std::int64_t resident_bytes_of_process() {
  std::ifstream file("/proc/self/statm");
  std::int64_t total_pages = 0, resident_pages = 0;
  file >> total_pages >> resident_pages;
  return resident_pages * static_cast<std::int64_t>(PageCache::page_bytes());
}

TEST(Locality, ReleasedPagesLeaveTheProcessAndComeBack) {
  const TempDir dir;
  ModelGeometry geometry = preset_geometry("tiny");
  geometry.hidden = 2048;
  geometry.intermediate = 1024;
  write_synthetic_checkpoint({.geometry = geometry}, dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  const ExpertWeights weights = checkpoint.load_experts(kLayer, 0, 8);
  const std::int64_t sum = sum_bytes(weights);
  const std::int64_t before = resident_bytes_of_process();
  for (int e = 0; e < 8; ++e) weights.release_pages(e);
  const std::int64_t after = resident_bytes_of_process();
  EXPECT_GT(before - after, static_cast<std::int64_t>(weights.bytes()) * 9 / 10);
  EXPECT_EQ(sum_bytes(weights), sum);
  weights.release_pages(-1);
  weights.release_pages(8);
}

TEST(Locality, WeightsInOrdinaryMemoryAreNeverReleased) {
  // Whole pages, so that giving them back would zero them.
  std::vector<std::uint8_t> codes(1 << 20, 0x17);
  ExpertWeights weights;
  weights.experts.resize(1);
  weights.experts[0].gate.codes = {codes.data(), DType::kPackedInt4, {1024, 1024}};
  weights.storage = std::make_shared<int>(1);
  weights.release_pages(0);
  for (const std::uint8_t byte : codes) ASSERT_EQ(byte, 0x17);
}

}  // namespace
}  // namespace sluice
