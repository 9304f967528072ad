#include "accuracy/column_gemm.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "core/fail.h"
#include "core/threads.h"
#include "sluice/quant.h"

namespace sluice::accuracy {
namespace {

constexpr int kTileN = 4;    // Output rows that share each load of a panel.
constexpr int kBlockN = 32;  // Output rows of one task; their weights of a group stay in cache.
constexpr std::align_val_t kAlignment{64};

#if defined(__x86_64__)
#define SLUICE_ACCURACY_AVX2 1
#endif

/// acc[r][c] = sum over `size` of w[r][k] * a[k][c], in order of k. Two registers of 32 bytes each
/// row; multiplication and addition round separately in every build.
template <class T>
[[gnu::always_inline]] inline void tile_body(const T* w, const T* a, int size, T* acc) {
  using Vector [[gnu::vector_size(32)]] = T;
  constexpr int kLanes = 32 / sizeof(T);
  Vector lo[kTileN] = {}, hi[kTileN] = {};
  for (int k = 0; k < size; ++k) {
    Vector a_lo, a_hi;
    std::memcpy(&a_lo, a + k * 2 * kLanes, 32);
    std::memcpy(&a_hi, a + k * 2 * kLanes + kLanes, 32);
    for (int r = 0; r < kTileN; ++r) {
      lo[r] += a_lo * w[k * kTileN + r];
      hi[r] += a_hi * w[k * kTileN + r];
    }
  }
  for (int r = 0; r < kTileN; ++r) {
    std::memcpy(acc + r * 2 * kLanes, &lo[r], 32);
    std::memcpy(acc + r * 2 * kLanes + kLanes, &hi[r], 32);
  }
}

template <class T>
void tile_baseline(const T* w, const T* a, int size, T* acc) {
  tile_body(w, a, size, acc);
}
#ifdef SLUICE_ACCURACY_AVX2
template <class T>
[[gnu::target("avx2")]] void tile_avx2(const T* w, const T* a, int size, T* acc) {
  tile_body(w, a, size, acc);
}
#endif

template <class T>
using Tile = void (*)(const T* w, const T* a, int size, T* acc);

template <class T>
Tile<T> best_tile() {
#ifdef SLUICE_ACCURACY_AVX2
  if (__builtin_cpu_supports("avx2")) return tile_avx2<T>;
#endif
  return tile_baseline<T>;
}

float scale_at(const QuantMatrix& m, std::int64_t n, std::int64_t g) {
  return scale_value(m.scales, n * m.scales.dim(1) + g);
}

/// Values of `rows` output rows in [k, k + size), as [rows / kTileN][size][kTileN]; rows past the
/// matrix's last repeat it and are thrown away.
template <class T>
void unpack(const SourceMatrix& matrix, bool original, std::int64_t n, int rows, int k, int size,
            T* out) {
  const QuantMatrix& m = matrix.quantized;
  for (int r = 0; r < rows; ++r) {
    T* const to = out + r / kTileN * size * kTileN + r % kTileN;
    const std::int64_t row = std::min(n + r, m.n() - 1);
    if (original) {
      const float* const from = matrix.original + row * m.k() + k;
      for (int i = 0; i < size; ++i) to[i * kTileN] = static_cast<T>(from[i]);
    } else {
      const std::uint8_t* const codes = m.codes.as<std::uint8_t>() + row * m.codes.dim(1);
      for (int i = 0; i < size; ++i)
        to[i * kTileN] = static_cast<T>(code_value(m.format, codes, k + i));
    }
  }
}

/// Rows [n, n + kBlockN) of the product.
template <class T>
void multiply_block(const SourceMatrix& matrix, bool original, const Columns<T>& in, double* out,
                    std::int64_t n, Tile<T> tile) {
  constexpr int kPanel = Columns<T>::kPanel;
  const QuantMatrix& m = matrix.quantized;
  const int size = original ? kActivationGroup : m.group_size;
  const auto rows = static_cast<int>(std::min<std::int64_t>(kBlockN, m.n() - n));
  const int padded_rows = (rows + kTileN - 1) / kTileN * kTileN;
  std::vector<T> w(static_cast<std::size_t>(kBlockN * kActivationGroup));
  // [panel][row][kPanel]
  std::vector<T> total(static_cast<std::size_t>(in.num_panels()) * kBlockN * kPanel);
  for (int k = 0; k < in.k(); k += size) {
    unpack(matrix, original, n, padded_rows, k, size, w.data());
    for (int p = 0; p < in.num_panels(); ++p) {
      const T* const column_scale = in.scales(p, k);
      for (int r = 0; r < rows; r += kTileN) {
        T acc[kTileN * kPanel];
        tile(&w[static_cast<std::size_t>(r * size)], in.panel(p, k), size, acc);
        for (int i = r; i < std::min(rows, r + kTileN); ++i) {
          const T row_scale =
              original ? T{1} : static_cast<T>(scale_at(m, n + i, k / m.group_size));
          T* const sum =
              &total[(static_cast<std::size_t>(p) * kBlockN + static_cast<std::size_t>(i)) *
                     kPanel];
          for (int c = 0; c < kPanel; ++c) {
            sum[c] += column_scale[c] * row_scale * acc[(i - r) * kPanel + c];
          }
        }
      }
    }
  }
  for (int c = 0; c < in.num_columns(); ++c) {
    for (int i = 0; i < rows; ++i) {
      out[c * m.n() + n + i] =
          total[static_cast<std::size_t>((c / kPanel * kBlockN + i) * kPanel + c % kPanel)] +
          (m.has_bias() ? static_cast<T>(m.bias.as<float>()[n + i]) : T{0});
    }
  }
}

}  // namespace

template <class T>
void Columns<T>::Free::operator()(T* p) const noexcept {
  ::operator delete[](p, kAlignment);
}

template <class T>
Columns<T>::Columns(int k, int num_columns) : k_(k), num_columns_(num_columns) {
  SLUICE_ASSERT(k % kActivationGroup == 0);
  const std::size_t panels = static_cast<std::size_t>(num_panels());
  const std::size_t count = panels * static_cast<std::size_t>(k) * kPanel;
  values_.reset(static_cast<T*>(::operator new[](count * sizeof(T), kAlignment)));
  std::fill_n(values_.get(), count, T{0});
  scales_.assign(panels * static_cast<std::size_t>(k / kActivationGroup) * kPanel, T{1});
}

template <class T>
void Columns<T>::set_scales(int column, std::span<const float> scales) {
  const int groups = k_ / kActivationGroup;
  for (int g = 0; g < groups; ++g) {
    scales_[static_cast<std::size_t>((column / kPanel * groups + g) * kPanel + column % kPanel)] =
        static_cast<T>(scales[scales.size() == 1 ? 0 : static_cast<std::size_t>(g)]);
  }
}

template <class T>
void multiply(const SourceMatrix& matrix, bool original, const Columns<T>& in, double* out,
              ThreadPool& pool) {
  SLUICE_ASSERT(in.k() == matrix.quantized.k());
  SLUICE_ASSERT(!original || matrix.original != nullptr);
  const Tile<T> tile = best_tile<T>();
  const std::int64_t n = matrix.quantized.n();
  pool.for_each_task((n + kBlockN - 1) / kBlockN, [&](std::int64_t task, int) {
    multiply_block(matrix, original, in, out, task * kBlockN, tile);
  });
}

template class Columns<double>;
template class Columns<float>;
template void multiply(const SourceMatrix&, bool, const Columns<double>&, double*, ThreadPool&);
template void multiply(const SourceMatrix&, bool, const Columns<float>&, double*, ThreadPool&);

}  // namespace sluice::accuracy
