// repack_fixture.h - what repacking makes of the same experts in every order that it takes: the
// bytes of prepare().
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/ops.h"
#include "bench/random_experts.h"
#include "repack_layouts.h"
#include "sluice/error.h"
#include "sluice/quant.h"
#include "sluice/repack.h"

namespace sluice::testing {

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

/// More experts than a backend takes at once, some of them with rows that are further apart: all in
/// one call.
inline void expect_many_experts(Backend& backend, const PackedBytes& bytes_of) {
  ModelGeometry int4{.name = "many",
                     .num_experts = 70,
                     .num_topk = 1,
                     .hidden = 384,
                     .intermediate = 128,
                     .group_size = 128};
  ModelGeometry mxfp4 = int4;
  mxfp4.group_size = 32, mxfp4.weight_format = WeightFormat::kMxfp4;
  for (const RepackCase& c : {RepackCase{int4, DType::kBFloat16, CodeRange::kAll},
                              RepackCase{int4, DType::kFloat32, CodeRange::kSymmetric},
                              RepackCase{mxfp4, DType::kFloat8E8M0, CodeRange::kAll}}) {
    const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, 15, c.range);
    const bool is_mxfp4 = c.geometry.weight_format == WeightFormat::kMxfp4;
    const WeightLayout layout = is_mxfp4 ? WeightLayout::kMxfp4 : WeightLayout::kInt4;
    const DeviceStack dense(weights, {.name = "", .weights = layout}, backend);
    const DeviceStack apart(weights, {.name = "", .weights = layout, .gap = 6}, backend);
    StackedSources found = stacked_sources(dense.weights);
    const StackedSources others = stacked_sources(apart.weights);
    for (const std::size_t e : {5, 6, 7, 8, 15, 69}) found.experts[e] = others.experts[e];
    auto room = ops(backend).make_room(found.format, {});
    ops(backend).repack(*room, 0, found.experts, backend.stream());
    ops(backend).finish_repack(*room, backend.stream());
    EXPECT_TRUE(bytes_of(*room) == bytes_of(*ops(backend).prepare(weights)))
        << to_string(c.scale_dtype);
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

/// Down's codes of every expert lie where its gate and up are packed to, and must be read before.
inline void expect_down_is_read_first(Backend& backend, const PackedBytes& bytes_of) {
  const RepackCase c = repack_cases(512, 384)[0];
  const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, 14, c.range);
  const Bytes wanted = bytes_of(*ops(backend).prepare(weights));
  const DeviceStack stack(weights, {.name = ""}, backend);
  StackedSources found = stacked_sources(stack.weights);
  const PackedSizes sizes = packed_sizes(found.format, backend.device().kind);
  const std::size_t total = packed_bytes(found.format, backend.device().kind);
  const std::size_t codes = stack.weights.w2.tensor.bytes() / found.experts.size();
  const auto memory = backend.allocate(total);
  std::byte* place = memory->data();
  for (ExpertSource& e : found.experts) {
    backend.copy_on_device(place, e.down.codes, codes, backend.stream());
    e.down.codes = place;
    place += sizes.gate_up_bytes;
  }
  MutableTensorView room;
  room.data = memory->data(), room.dtype = DType::kUInt8;
  room.shape = {static_cast<std::int64_t>(total)}, room.device = backend.device();
  EXPECT_TRUE(bytes_of(*repacked(found, backend, room)) == wanted);
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
