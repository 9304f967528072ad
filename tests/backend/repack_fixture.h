// repack_fixture.h - the same experts in every order that repacking takes, on the device of a
// backend, and what comes of them: the bytes of prepare().
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "backend/ops.h"
#include "bench/random_experts.h"
#include "sluice/error.h"
#include "sluice/quant.h"
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
  if (layout.weights == WeightLayout::kInt4) {
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

/// Of packed experts, all that was written: what a backend's test makes of them.
using PackedBytes = std::function<Bytes(const PreparedExperts&)>;

inline std::unique_ptr<PreparedExperts> repacked(const StackedSources& found, Backend& backend,
                                                 const MutableTensorView& memory = {}) {
  auto room = ops(backend).make_room(found.format, memory);
  // In two parts, the later one first: experts may come in any order.
  const auto half = static_cast<std::ptrdiff_t>(found.experts.size() / 2);
  const std::span<const ExpertSource> all(found.experts);
  if (memory.empty()) {
    ops(backend).repack(*room, static_cast<int>(half), all.subspan(static_cast<std::size_t>(half)),
                        backend.stream());
    ops(backend).repack(*room, 0, all.first(static_cast<std::size_t>(half)), backend.stream());
  } else {
    ops(backend).repack(*room, 0, all, backend.stream());
  }
  ops(backend).finish_repack(*room, backend.stream());
  return room;
}

struct RepackCase {
  ModelGeometry geometry;
  DType scale_dtype;
  CodeRange range;
};
/// `smallest`: hidden and intermediate where 4 scales are side by side, multiples of 512.
inline std::vector<RepackCase> repack_cases(int hidden, int intermediate) {
  std::vector<RepackCase> cases;
  for (const int group : {128, 32}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      for (const CodeRange range : {CodeRange::kAll, CodeRange::kSymmetric}) {
        cases.push_back({{.name = "repack",
                          .num_experts = 3,
                          .num_topk = 1,
                          .hidden = hidden,
                          .intermediate = intermediate,
                          .group_size = group},
                         dtype,
                         range});
      }
    }
  }
  return cases;
}

inline std::string text_of(const RepackCase& c, const Layout& layout) {
  return std::string(layout.name) + ", " + to_string(c.scale_dtype) + " per " +
         std::to_string(c.geometry.group_size) +
         (c.range == CodeRange::kAll ? ", -8 is there" : "");
}

/// Every order gives the bytes that prepare() makes of the same weights in host memory.
inline void expect_the_bytes_of_prepare(Backend& backend, const PackedBytes& bytes_of) {
  for (const RepackCase& c : repack_cases(1024, 512)) {
    const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, 11, c.range);
    const Bytes wanted = bytes_of(*ops(backend).prepare(weights));
    for (const Layout& layout : kLayouts) {
      const DeviceStack stack(weights, layout, backend);
      const StackedSources found = stacked_sources(stack.weights);
      EXPECT_EQ(found.format.geometry.group_size, c.geometry.group_size);
      EXPECT_TRUE(bytes_of(*repacked(found, backend)) == wanted) << text_of(c, layout);
    }
  }
}

/// Codes and scales that lie in the memory that they are packed into: each part of it ends with its
/// codes, and scales lie in front of them until they are copied away.
inline void expect_packing_in_place(Backend& backend, const PackedBytes& bytes_of) {
  for (const RepackCase& c : repack_cases(512, 384)) {
    const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, 12, c.range);
    const Bytes wanted = bytes_of(*ops(backend).prepare(weights));
    const DeviceStack stack(weights, {.name = ""}, backend);
    StackedSources found = stacked_sources(stack.weights);
    const PackedSizes sizes = packed_sizes(found.format, backend.device().kind);
    const std::size_t total = packed_bytes(found.format, backend.device().kind);
    const auto memory = backend.allocate(total);
    std::byte* part_end = memory->data();
    for (const bool is_down : {false, true}) {
      const auto count = static_cast<std::size_t>(found.format.num_experts);
      part_end += count * (is_down ? sizes.down_bytes : sizes.gate_up_bytes);
      const TensorView& t = is_down ? stack.weights.w2.tensor : stack.weights.w13.tensor;
      std::byte* const codes = part_end - t.bytes();
      backend.copy_on_device(codes, t.data, t.bytes(), backend.stream());
      for (ExpertSource& e : found.experts) {
        const auto move = [&](MatrixSource& m) { m.codes = codes + (m.codes - t.as<std::byte>()); };
        is_down ? move(e.down) : (move(e.gate), move(e.up));
      }
    }
    MutableTensorView room;
    room.data = memory->data(), room.dtype = DType::kUInt8;
    room.shape = {static_cast<std::int64_t>(total)}, room.device = backend.device();
    const auto experts = repacked(found, backend, room);
    EXPECT_TRUE(bytes_of(*experts) == wanted) << c.geometry.group_size << to_string(c.scale_dtype);
    // The other way round, packing the first expert would overwrite the second.
    std::swap(found.experts[0], found.experts[2]);
    try {
      (void)repacked(found, backend, room);
      ADD_FAILURE() << "not refused";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("packing the experts before it overwrites it"),
                std::string::npos)
          << error.what();
    }
  }
}

/// The first bad scale is named, whoever finds it first.
inline void expect_bad_scales_are_named(Backend& backend) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const RepackCase c = repack_cases(256, 128)[dtype == DType::kFloat32 ? 2 : 0];
    const auto with = [&](int matrix, std::int64_t at, float value) {
      ExpertWeights w = random_experts(c.geometry, dtype, 13, CodeRange::kSymmetric);
      for (const std::int64_t i : {at, at + 5}) {  // A later one must not win.
        for (std::size_t e = 1; e < 3; ++e) {
          auto* scales = const_cast<void*>(rows_of(w, e, matrix, false).data);
          dtype == DType::kFloat32
              ? void(static_cast<float*>(scales)[i] = value)
              : void(static_cast<std::uint16_t*>(scales)[i] = bf16_from_float(value));
        }
      }
      return w;
    };
    const auto expect = [&](const std::function<void()>& call, const std::string& text) {
      try {
        call();
        ADD_FAILURE() << "not refused: " << text;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
      }
    };
    struct Bad {
      int matrix;
      std::int64_t at;
      float value;
      std::string text;
    };
    for (const Bad& bad : {Bad{0, 7, nan, "expert 1 gate: scale [3, 1] = nan is not a finite"},
                           Bad{1, 200, infinity, "expert 1 up: scale [100, 0] = inf"},
                           Bad{2, 130, -infinity, "expert 1 down: scale [130, 0] = -inf"},
                           Bad{2, 0, 0x1p119f, "expert 1 down: scale [0, 0] = 6.6"}}) {
      const ExpertWeights w = with(bad.matrix, bad.at, bad.value);
      expect([&] { (void)ops(backend).prepare(w); }, bad.text);
      for (const Layout& layout : {kLayouts[0], kLayouts[3]}) {
        const DeviceStack stack(w, layout, backend);
        expect([&] { (void)repacked(stacked_sources(stack.weights), backend); }, bad.text);
      }
    }
  }
}

}  // namespace sluice::testing
