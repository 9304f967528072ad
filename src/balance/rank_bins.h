// rank_bins.h - replicas of experts in the slots of ranks: first by size, then by exchanges.
//
// The same code puts groups of experts on hosts: a bin is a rank or a host, an item an expert or a
// group.
#pragma once

#include <cstddef>
#include <vector>

namespace sluice {

class RankBins {
 public:
  /// rows, num_replicas: of each item, 0 replicas of those that are not here. No item has more
  /// replicas than there are bins, and all replicas together fit.
  RankBins(std::size_t num_bins, std::size_t slots_per_bin, std::vector<double> rows,
           std::vector<int> num_replicas);

  /// The largest replica first, each into the bin with the fewest rows that has room and no replica
  /// of the same item.
  void pack();
  /// Makes the fullest bin less full, as long as one step does. A step moves a replica of it to
  /// another bin, in exchange for another one or into an empty slot. With `may_repeat` a step may
  /// also end a replica, or begin one in an empty slot or in the place of another item's.
  void improve(bool may_repeat);

  /// Items of a bin, in no order.
  [[nodiscard]] const std::vector<std::size_t>& items(std::size_t bin) const {
    return bins_[bin].items;
  }
  [[nodiscard]] double fullest_rows() const { return bins_[fullest()].rows; }
  /// The fullest bin has next to nothing above the mean.
  [[nodiscard]] bool is_even() const;

 private:
  struct Bin {
    std::vector<std::size_t> items;
    std::vector<char> holds;  // [num_items]
    double rows = 0;
  };
  /// `leaves` of bin `from` and `comes` into it, each an item or kNone. With another bin `to`, the
  /// two change places; without one, a replica ends or begins.
  struct Step {
    static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
    double fullest = 0;  // Rows of the fullest bin that the step changes, afterwards.
    std::size_t from = kNone, to = kNone, leaves = kNone, comes = kNone;
  };

  [[nodiscard]] std::size_t fullest() const;
  [[nodiscard]] double mean_rows() const;
  [[nodiscard]] bool has_room(const Bin& bin) const { return bin.items.size() < capacity_; }
  [[nodiscard]] double share(std::size_t item) const { return share_[item]; }
  void insert(Bin& bin, std::size_t item);
  void erase(Bin& bin, std::size_t item);
  void make_room_for(std::size_t item);
  void consider_exchanges(std::size_t from, Step& best) const;
  void consider_repeats(std::size_t from, Step& best) const;
  void rate_repeat(std::size_t bin, std::size_t ends, std::size_t begins, Step& best) const;
  void take(const Step& step);
  void change_replicas(std::size_t item, int difference);

  std::vector<Bin> bins_;
  std::size_t capacity_;
  std::vector<double> rows_;       // [num_items]
  std::vector<int> num_replicas_;  // [num_items]
  std::vector<double> share_;      // [num_items] rows of one replica
};

}  // namespace sluice
