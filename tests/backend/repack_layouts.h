// repack_layouts.h - the same experts in every order that repacking takes, on the device of a
// backend.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "sluice/backend.h"
#include "sluice/checkpoint.h"
#include "sluice/repack.h"

namespace sluice::testing {

using Bytes = std::vector<std::uint8_t>;

struct Layout {
  const char* name;
  WeightLayout weights = WeightLayout::kInt4;
  int interleave = 0;  ///< Groups of a row side by side; 0: plain scales.
  int gap = 0;         ///< Elements between rows of codes and of scales.
};
inline const std::vector<Layout> kLayouts = {
    {.name = "as published"},
    {.name = "rows apart", .gap = 6},
    {.name = "interleaved by 4", .interleave = 4},
    {.name = "interleaved by 1", .interleave = 1},
    {.name = "uint4b8", .weights = WeightLayout::kUint4b8},
    {.name = "uint4b8, transposed", .weights = WeightLayout::kUint4b8Transposed, .interleave = 1},
};

/// One of the stacked tensors, in host memory.
struct HostTensor {
  Bytes bytes;
  StridedView view;
};

inline TensorView rows_of(const ExpertWeights& w, std::size_t expert, int matrix, bool codes) {
  const Expert& e = w.experts[expert];
  const QuantMatrix& m = matrix == 0 ? e.gate : matrix == 1 ? e.up : e.down;
  return codes ? m.codes : m.scales;
}

/// Matrices `first` .. `last` of every expert, one under the other, [E, N, columns] row-major.
inline HostTensor stack(const ExpertWeights& w, int first, int last, bool codes) {
  HostTensor t;
  std::int64_t rows = 0, columns = 0;
  for (std::size_t e = 0; e < w.experts.size(); ++e) {
    rows = 0;
    for (int m = first; m <= last; ++m) {
      const TensorView v = rows_of(w, e, m, codes);
      const auto* data = v.as<std::uint8_t>();
      t.bytes.insert(t.bytes.end(), data, data + v.bytes());
      rows += v.dim(0), columns = v.dim(1);
      t.view.tensor.dtype = codes ? DType::kInt8 : v.dtype;
    }
  }
  t.view.tensor.shape = {static_cast<std::int64_t>(w.experts.size()), rows, columns};
  t.view.strides = {rows * columns, columns, 1};
  return t;
}

/// Elements of a dense [E, N, columns] moved to at(e, n, c) of a tensor of another shape.
inline HostTensor moved(
    const HostTensor& from, DType dtype, Shape shape, std::int64_t row_stride, std::size_t element,
    const std::function<std::int64_t(std::int64_t, std::int64_t, std::int64_t)>& at,
    std::int64_t columns) {
  HostTensor to;
  const Shape& s = from.view.tensor.shape;
  to.view.tensor.dtype = dtype, to.view.tensor.shape = shape;
  to.view.strides = {shape[1] * row_stride, row_stride, 1};
  to.bytes.assign(static_cast<std::size_t>(shape[0] * shape[1] * row_stride) * element, 0x5a);
  for (std::int64_t e = 0, i = 0; e < s[0]; ++e) {
    for (std::int64_t n = 0; n < s[1]; ++n) {
      for (std::int64_t c = 0; c < columns; ++c, ++i) {
        std::memcpy(
            &to.bytes[static_cast<std::size_t>(e * to.view.strides[0] + at(e, n, c)) * element],
            &from.bytes[static_cast<std::size_t>(i) * element], element);
      }
    }
  }
  return to;
}

inline HostTensor laid_out_codes(HostTensor t, const Layout& layout) {
  const Shape s = t.view.tensor.shape;
  if (layout.weights == WeightLayout::kInt4 || layout.weights == WeightLayout::kMxfp4) {
    const std::int64_t stride = s[2] + layout.gap;
    return moved(
        t, DType::kInt8, s, stride, 1, [=](auto, auto n, auto c) { return n * stride + c; }, s[2]);
  }
  for (std::uint8_t& b : t.bytes) b ^= 0x88;
  const std::int64_t words = s[2] / 4;
  if (layout.weights == WeightLayout::kUint4b8) {
    return moved(
        t, DType::kInt32, {s[0], s[1], words}, words, 4,
        [=](auto, auto n, auto c) { return n * words + c; }, words);
  }
  return moved(
      t, DType::kInt32, {s[0], words, s[1]}, s[1], 4,
      [=](auto, auto n, auto c) { return c * s[1] + n; }, words);
}

inline HostTensor laid_out_scales(const HostTensor& t, const Layout& layout) {
  const Shape s = t.view.tensor.shape;
  const DType dtype = t.view.tensor.dtype;
  const std::size_t element = size_bytes(dtype);
  if (layout.interleave == 0) {
    const std::int64_t stride = s[2] + layout.gap;
    return moved(
        t, dtype, s, stride, element, [=](auto, auto n, auto c) { return n * stride + c; }, s[2]);
  }
  const std::int64_t a = layout.interleave;
  return moved(
      t, dtype, {s[0], s[2] / a, s[1] * a}, s[1] * a, element,
      [=](auto, auto n, auto c) { return c / a * s[1] * a + n * a + c % a; }, s[2]);
}

/// Tensors of one order on the device.
class DeviceStack {
 public:
  DeviceStack(const ExpertWeights& w, const Layout& layout, Backend& backend) : backend_(backend) {
    weights.w13 = put(laid_out_codes(stack(w, 0, 1, true), layout));
    weights.w13_scale = put(laid_out_scales(stack(w, 0, 1, false), layout));
    weights.w2 = put(laid_out_codes(stack(w, 2, 2, true), layout));
    weights.w2_scale = put(laid_out_scales(stack(w, 2, 2, false), layout));
    weights.weight_layout = layout.weights;
    weights.activation = w.geometry.activation;
  }
  StackedWeights weights;

 private:
  StridedView put(const HostTensor& t) {
    buffers_.push_back(backend_.allocate(t.bytes.size()));
    backend_.copy_from_host(buffers_.back()->data(), t.bytes.data(), t.bytes.size(),
                            backend_.stream());
    StridedView v = t.view;
    v.tensor.data = buffers_.back()->data(), v.tensor.device = backend_.device();
    return v;
  }
  Backend& backend_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
};

}  // namespace sluice::testing
