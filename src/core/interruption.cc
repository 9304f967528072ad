#include "core/interruption.h"

#include <algorithm>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

/// Often enough for whoever presses a key, and rarely enough to cost nothing.
constexpr std::chrono::milliseconds kLook{50};

}  // namespace

thread_local Interruptible* Interruption::innermost = nullptr;

Interruptible::Interruptible(std::function<bool()> wants_out)
    : wants_out_(std::move(wants_out)), outer_(Interruption::innermost) {
  Interruption::innermost = this;
}

Interruptible::~Interruptible() {
  Interruption::innermost = outer_;
}

Interruption::Deadline Interruption::next_look(Deadline deadline) {
  if (innermost == nullptr) return deadline;
  if (innermost->next_look_ == Deadline{}) {
    innermost->next_look_ = std::chrono::steady_clock::now() + kLook;
  }
  return std::min(deadline, innermost->next_look_);
}

void Interruption::look() {
  if (innermost == nullptr) return;
  const Deadline now = std::chrono::steady_clock::now();
  if (now < next_look(Deadline::max())) return;
  innermost->next_look_ = now + kLook;
  if (innermost->wants_out_()) {
    fail(ErrorCode::kInterrupted, "interrupted while it waited for other ranks");
  }
}

}  // namespace sluice
