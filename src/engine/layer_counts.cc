// Rows of each expert, counted by the calls of a layer where the exchange counts them anyway.
#include <cstring>
#include <numeric>
#include <string>

#include "core/fail.h"
#include "engine/layer_impl.h"
#include "exchange/agreement.h"
#include "sluice/config.h"
#include "sluice/transport.h"

namespace sluice {

Routing Layer::Impl::counted(Routing routing) const {
  if (!counts_rows) return routing;
  routing.row_totals.data = row_totals->data();
  routing.row_totals.dtype = DType::kInt64;
  routing.row_totals.shape = Shape{group->placement.num_local()};
  routing.row_totals.device = group->backend->device();
  return routing;
}

void Layer::count_rows(bool on) {
  Impl& self = *impl_;
  if (on && !self.row_totals) {
    const auto count = static_cast<std::size_t>(self.group->placement.num_local());
    self.row_totals = self.group->backend->allocate(count * sizeof(std::int64_t));
    reset_counted_rows(self.group->backend->stream());
  }
  self.counts_rows = on;
}

std::vector<std::int64_t> Layer::counted_rows(Stream stream) const {
  const Impl& self = *impl_;
  std::vector<std::int64_t> rows(static_cast<std::size_t>(self.group->placement.num_local()));
  if (self.row_totals) {
    self.group->backend->copy_to_host(rows.data(), self.row_totals->data(),
                                      rows.size() * sizeof(rows[0]), stream);
  }
  return rows;
}

std::vector<std::int64_t> Layer::counted_rows_of_all(Stream stream) const {
  const Impl& self = *impl_;
  const LayerGroup::Impl& group = *self.group;
  const std::string call = "counted_rows_of_all of " + group.name_of_layer(self.number);
  require_agreement(*group.transport,
                    {{"version", version()}, {kCall, call}, group.group_of(self.name)},
                    group.config.peer_timeout, call);
  const std::vector<std::int64_t> mine = counted_rows(stream);
  const auto of_ranks =
      group.transport->all_gather(std::as_bytes(std::span(mine)), group.config.peer_timeout);
  const Placement& where = self.placement();
  std::vector<std::int64_t> rows(static_cast<std::size_t>(where.num_experts()));
  std::vector<std::int64_t> part(mine.size());
  for (int r = 0; r < where.num_ranks(); ++r) {
    const auto& bytes = of_ranks[static_cast<std::size_t>(r)];
    SLUICE_ASSERT(bytes.size() == part.size() * sizeof(part[0]));
    std::memcpy(part.data(), bytes.data(), bytes.size());
    const std::span<const int> experts = where.slot_experts(r);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (experts[i] != kEmptySlot) rows[static_cast<std::size_t>(experts[i])] += part[i];
    }
  }
  return rows;
}

void Layer::reset_counted_rows(Stream stream) {
  Impl& self = *impl_;
  if (!self.row_totals) return;
  const std::vector<std::int64_t> zeros(
      static_cast<std::size_t>(self.group->placement.num_local()));
  self.group->backend->copy_from_host(self.row_totals->data(), zeros.data(),
                                      zeros.size() * sizeof(zeros[0]), stream);
}

}  // namespace sluice
