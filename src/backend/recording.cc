// What backends have in common whose calls return when the work is done and whose memory the host
// reads: a recording simply does the work again.
#include <chrono>

#include "backend/ops.h"
#include "core/checksum.h"
#include "core/fail.h"

namespace sluice {
namespace {

class RepeatedCalls final : public Recording {
 public:
  explicit RepeatedCalls(MarkedWork work) : work_(std::move(work)) {}
  void replay() override {
    times_.clear();
    work_([this] { times_.push_back(Clock::now()); });
  }
  [[nodiscard]] std::vector<double> marks_us() override {
    std::vector<double> us;
    for (std::size_t i = 1; i < times_.size(); ++i) {
      us.push_back(std::chrono::duration<double, std::micro>(times_[i] - times_[i - 1]).count());
    }
    return us;
  }

 private:
  using Clock = std::chrono::steady_clock;
  MarkedWork work_;
  std::vector<Clock::time_point> times_;
};

class PlainWork final : public RepeatedWork {
 public:
  explicit PlainWork(std::function<void(Stream)> work) : work_(std::move(work)) {}
  void queue(Stream stream) override { work_(stream); }

 private:
  std::function<void(Stream)> work_;
};

}  // namespace

std::unique_ptr<RepeatedWork> BackendOps::make_repeated_work(std::function<void(Stream)> work) {
  return std::make_unique<PlainWork>(std::move(work));
}

std::unique_ptr<Recording> BackendOps::record(Stream stream, MarkedWork work) {
  return repeat(stream, std::move(work));
}

std::unique_ptr<Recording> BackendOps::repeat(Stream, MarkedWork work) {
  return std::make_unique<RepeatedCalls>(std::move(work));
}

std::uint64_t BackendOps::checksum(std::span<const std::byte> bytes, std::uint64_t first_word,
                                   Stream) {
  return checksum_of(bytes, first_word);
}

std::array<std::span<std::byte>, 2> PreparedExperts::expert_bytes(int) {
  fail(ErrorCode::kUnsupported, "experts of this backend cannot move between slots");
}

}  // namespace sluice
