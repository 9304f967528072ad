#include "balance/rank_bins.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

// A fullest bin this near to the mean is left alone: rows of the next step differ by more.
constexpr double kNearMean = 1e-3;
// A step has to gain so much, as a part of the mean, so that there are few of them.
constexpr double kWorthwhile = 1e-4;

}  // namespace

RankBins::RankBins(std::size_t num_bins, std::size_t slots_per_bin, std::vector<double> rows,
                   std::vector<int> num_replicas)
    : bins_(num_bins),
      capacity_(slots_per_bin),
      rows_(std::move(rows)),
      num_replicas_(std::move(num_replicas)),
      share_(rows_.size()) {
  for (Bin& bin : bins_) bin.holds.resize(rows_.size());
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (num_replicas_[i] > 0) share_[i] = rows_[i] / num_replicas_[i];
  }
}

void RankBins::insert(Bin& bin, std::size_t item) {
  bin.items.push_back(item);
  bin.holds[item] = 1;
  bin.rows += share(item);
}

void RankBins::erase(Bin& bin, std::size_t item) {
  bin.items.erase(std::ranges::find(bin.items, item));
  bin.holds[item] = 0;
  bin.rows -= share(item);
}

std::size_t RankBins::fullest() const {
  return static_cast<std::size_t>(std::ranges::max_element(bins_, {}, &Bin::rows) - bins_.begin());
}

double RankBins::mean_rows() const {
  double sum = 0;
  for (const Bin& bin : bins_) sum += bin.rows;
  return sum / static_cast<double>(bins_.size());
}

bool RankBins::is_even() const {
  return fullest_rows() <= mean_rows() * (1 + kNearMean);
}

void RankBins::pack() {
  std::vector<std::size_t> order;  // Each item as often as it has replicas.
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    order.insert(order.end(), static_cast<std::size_t>(num_replicas_[i]), i);
  }
  std::ranges::stable_sort(order, std::greater{}, [&](std::size_t i) { return share(i); });
  for (const std::size_t item : order) {
    Bin* emptiest = nullptr;
    for (Bin& bin : bins_) {
      if (!has_room(bin) || bin.holds[item] || (emptiest && emptiest->rows <= bin.rows)) continue;
      emptiest = &bin;
    }
    if (emptiest) {
      insert(*emptiest, item);
    } else {
      make_room_for(item);
    }
  }
}

/// Every bin with room has this item. A full bin that lacks it takes it, and gives away an item to
/// a bin with room: the smallest one that the bin with room lacks. There is one, since the full bin
/// has more items than the other, and no bin has an item twice.
void RankBins::make_room_for(std::size_t item) {
  const auto open = std::ranges::find_if(bins_, [&](const Bin& bin) { return has_room(bin); });
  const auto full = std::ranges::find_if(bins_, [&](const Bin& bin) { return !bin.holds[item]; });
  SLUICE_ASSERT(open != bins_.end() && full != bins_.end());
  std::size_t given = Step::kNone;
  for (const std::size_t candidate : full->items) {
    if (open->holds[candidate]) continue;
    if (given == Step::kNone || share(candidate) < share(given)) given = candidate;
  }
  SLUICE_ASSERT(given != Step::kNone);
  insert(*open, given);
  erase(*full, given);
  insert(*full, item);
}

void RankBins::consider_exchanges(std::size_t from, Step& best) const {
  const Bin& full = bins_[from];
  for (std::size_t to = 0; to < bins_.size(); ++to) {
    const Bin& other = bins_[to];
    if (to == from || other.rows >= best.fullest) continue;
    const auto rate = [&](std::size_t leaves, std::size_t comes, double difference) {
      const double fullest = std::max(full.rows - difference, other.rows + difference);
      if (fullest < best.fullest) best = {fullest, from, to, leaves, comes};
    };
    for (const std::size_t leaves : full.items) {
      if (other.holds[leaves]) continue;
      if (has_room(other)) rate(leaves, Step::kNone, share(leaves));
      for (const std::size_t comes : other.items) {
        const double difference = share(leaves) - share(comes);
        if (difference > 0 && !full.holds[comes]) rate(leaves, comes, difference);
      }
    }
  }
}

/// In `bin` a replica of `ends` ends and one of `begins` begins; either may be kNone.
void RankBins::rate_repeat(std::size_t bin, std::size_t ends, std::size_t begins,
                           Step& best) const {
  const auto grown = [&](std::size_t item, int difference) {
    return rows_[item] / (num_replicas_[item] + difference);
  };
  double fullest = 0;
  for (std::size_t b = 0; b < bins_.size(); ++b) {
    const Bin& one = bins_[b];
    double rows = one.rows;
    bool changes = b == bin;
    if (ends != Step::kNone && one.holds[ends]) {
      rows += (b == bin ? 0 : grown(ends, -1)) - share(ends);
      changes = true;
    }
    if (begins != Step::kNone && (b == bin || one.holds[begins])) {
      rows += grown(begins, +1) - (one.holds[begins] ? share(begins) : 0);
      changes = true;
    }
    if (!changes) continue;
    fullest = std::max(fullest, rows);
    if (fullest >= best.fullest) return;
  }
  best = {fullest, bin, Step::kNone, ends, begins};
}

void RankBins::consider_repeats(std::size_t from, Step& best) const {
  const Bin& full = bins_[from];
  for (const std::size_t ends : full.items) {
    if (num_replicas_[ends] > 1) rate_repeat(from, ends, Step::kNone, best);
  }
  for (const std::size_t begins : full.items) {
    if (share(begins) == 0) continue;
    for (std::size_t to = 0; to < bins_.size(); ++to) {
      const Bin& other = bins_[to];
      if (other.holds[begins]) continue;
      if (has_room(other)) rate_repeat(to, Step::kNone, begins, best);
      for (const std::size_t ends : other.items) {
        if (num_replicas_[ends] > 1) rate_repeat(to, ends, begins, best);
      }
    }
  }
}

/// One replica more or less: the others of the item have less or more rows.
void RankBins::change_replicas(std::size_t item, int difference) {
  const double before = share(item);
  num_replicas_[item] += difference;
  share_[item] = rows_[item] / num_replicas_[item];
  for (Bin& bin : bins_) {
    if (bin.holds[item]) bin.rows += share(item) - before;
  }
}

void RankBins::take(const Step& step) {
  Bin& from = bins_[step.from];
  const bool has_other = step.to != Step::kNone;
  if (step.leaves != Step::kNone) {
    erase(from, step.leaves);
    has_other ? insert(bins_[step.to], step.leaves) : change_replicas(step.leaves, -1);
  }
  if (step.comes != Step::kNone) {
    has_other ? erase(bins_[step.to], step.comes) : change_replicas(step.comes, +1);
    insert(from, step.comes);
  }
}

void RankBins::improve(bool may_repeat) {
  const double gain = mean_rows() * kWorthwhile;
  while (!is_even()) {
    const std::size_t from = fullest();
    Step best{.fullest = bins_[from].rows - gain};
    consider_exchanges(from, best);
    if (may_repeat) consider_repeats(from, best);
    if (best.from == Step::kNone) return;
    take(best);
  }
}

}  // namespace sluice
