// A placement as a table that kernels read.
#include <algorithm>
#include <vector>

#include "backend/traits.h"
#include "core/fail.h"
#include "sluice/backend.h"
#include "sluice/exchange.h"

namespace sluice {

ExpertSlots::ExpertSlots(const Placement& placement, Backend& backend)
    : placement_(placement), backend_(&backend) {
  if (traits_of(backend.device().kind).has_host_memory) return;
  const auto words = static_cast<std::size_t>(placement.num_experts() + 1) +
                     2 * static_cast<std::size_t>(placement.num_slots());
  table_ = backend.allocate(words * sizeof(std::uint32_t));
  write_table(backend.stream());
}

ExpertSlots::ExpertSlots(ExpertSlots&&) noexcept = default;
ExpertSlots& ExpertSlots::operator=(ExpertSlots&&) noexcept = default;
ExpertSlots::~ExpertSlots() = default;

void ExpertSlots::assign(const Placement& placement, Stream stream) {
  const auto check = [](const char* what, int value, int had) {
    check_argument(value == had, "placement has {} {}, these slots were made for {}", value, what,
                   had);
  };
  check("experts", placement.num_experts(), placement_.num_experts());
  check("slots", placement.num_slots(), placement_.num_slots());
  check("ranks", placement.num_ranks(), placement_.num_ranks());
  placement_ = placement;
  if (table_) write_table(stream);
}

void ExpertSlots::write_table(Stream stream) {
  const auto experts = static_cast<std::size_t>(placement_.num_experts());
  const std::span<const int> of_slots = placement_.slot_experts();
  std::vector<std::uint32_t> words(experts + 1 + 2 * of_slots.size());
  std::uint32_t* next = words.data() + experts + 1;
  for (std::size_t e = 0; e < experts; ++e) {
    const std::span<const int> slots = placement_.slots_of(static_cast<int>(e));
    words[e + 1] = words[e] + static_cast<std::uint32_t>(slots.size());
    next = std::ranges::copy(slots, next).out;
  }
  std::ranges::copy(of_slots, words.data() + experts + 1 + of_slots.size());
  backend_->copy_from_host(table_->data(), words.data(), table_->bytes(), stream);
}

const std::uint32_t* ExpertSlots::device_table() const noexcept {
  return table_ ? reinterpret_cast<const std::uint32_t*>(table_->data()) : nullptr;
}

}  // namespace sluice
