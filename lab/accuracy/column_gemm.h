// column_gemm.h - one weight matrix times many columns, in float64 or as a float32 backend adds.
//
//   out[c][n] = sum_g in.scale(g, c) * w_scale[n, g] * sum_{k in g} w[n, k] * in.value(k, c)
//
// T = double: everything in double; products of int4, float or e4m3 numbers are exact in it.
// T = float: each group's sum starts fresh in float32 and is added to a float32 total, as the layer
// is defined. The order of additions is fixed: neither threads nor vector width change a bit.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "sluice/lab/accuracy.h"
#include "sluice/quant.h"

namespace sluice {

class ThreadPool;

namespace accuracy {

/// Columns of K values each, stored in panels: [panel][k][kPanel].
template <class T>
class Columns {
 public:
  static constexpr int kPanel = 64 / sizeof(T);  ///< One cache line.

  Columns(int k, int num_columns);

  [[nodiscard]] int k() const noexcept { return k_; }
  [[nodiscard]] int num_columns() const noexcept { return num_columns_; }
  [[nodiscard]] int num_panels() const noexcept { return (num_columns_ + kPanel - 1) / kPanel; }

  /// One scale for the column (`scales` of one element), or one per 128 values.
  void set_scales(int column, std::span<const float> scales);
  [[nodiscard]] T& value(int k, int column) noexcept {
    return values_.get()[(static_cast<std::size_t>(column / kPanel) * static_cast<std::size_t>(k_) +
                          static_cast<std::size_t>(k)) *
                             kPanel +
                         static_cast<std::size_t>(column % kPanel)];
  }
  [[nodiscard]] const T* panel(int p, int k) const noexcept {
    return values_.get() + (static_cast<std::size_t>(p) * static_cast<std::size_t>(k_) +
                            static_cast<std::size_t>(k)) *
                               kPanel;
  }
  /// Scales of a panel's columns in the 128-group that holds k.
  [[nodiscard]] const T* scales(int p, int k) const noexcept {
    return scales_.data() +
           (static_cast<std::size_t>(p) * static_cast<std::size_t>(k_ / kActivationGroup) +
            static_cast<std::size_t>(k / kActivationGroup)) *
               kPanel;
  }

 private:
  struct Free {
    void operator()(T* p) const noexcept;
  };
  int k_, num_columns_;
  std::unique_ptr<T[], Free> values_;  // 64-byte aligned, zero in unused columns.
  std::vector<T> scales_;              // [panel][k / 128][kPanel]
};

/// out: [num_columns, n]. `original`: multiply by the matrix's original values instead.
template <class T>
void multiply(const SourceMatrix& matrix, bool original, const Columns<T>& in, double* out,
              ThreadPool& pool);

}  // namespace accuracy
}  // namespace sluice
