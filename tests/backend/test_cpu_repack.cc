// Repacking on the CPU from memory in every order; what it asks of its sources; how tensors are
// read.
#include "backend/cpu/prepared_experts.h"
#include "repack_fixture.h"
#include "sluice/experts.h"
#include "sluice/local_experts.h"
#include "sluice/recipe.h"

namespace sluice::testing {
namespace {

Bytes bytes_of(const PreparedExperts& prepared) {
  const auto& experts = static_cast<const cpu::PreparedCpuExperts&>(prepared);
  Bytes all;
  const auto add = [&](const void* data, std::int64_t bytes) {
    const auto* first = static_cast<const std::uint8_t*>(data);
    all.insert(all.end(), first, first + bytes);
  };
  for (int e = 0; e < experts.num_experts(); ++e) {
    const cpu::PreparedExpert& expert = experts.expert(e);
    for (const cpu::PreparedMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
      add(m->codes, m->code_bytes());
      add(m->scales, m->scale_bytes());
    }
  }
  return all;
}

TEST(CpuRepack, EveryOrderGivesTheBytesOfPrepare) {
  expect_the_bytes_of_prepare(*make_backend({.num_threads = 2}), bytes_of);
}

TEST(CpuRepack, ManyExpertsAtOnce) {
  expect_many_experts(*make_backend({.num_threads = 2}), bytes_of);
}

TEST(CpuRepack, InTheMemoryOfTheCodes) {
  expect_packing_in_place(*make_backend({.num_threads = 2}), bytes_of);
}

TEST(CpuRepack, DownInThePlaceOfGateAndUp) {
  expect_down_is_read_first(*make_backend({.num_threads = 2}), bytes_of);
}

TEST(CpuRepack, BadScalesAreNamed) {
  expect_bad_scales_are_named(*make_backend({.num_threads = 2}));
}

/// What `edit` has made of sound tensors is refused with this text.
void expect_refused(const std::string& text, const std::function<void(StackedWeights&)>& edit) {
  const RepackCase c = repack_cases(1024, 512)[0];
  const auto backend = make_backend({.num_threads = 1});
  DeviceStack stack(random_experts(c.geometry, c.scale_dtype, 1), kLayouts[0], *backend);
  (void)repacked(stacked_sources(stack.weights), *backend);
  edit(stack.weights);
  try {
    (void)repacked(stacked_sources(stack.weights), *backend);
    ADD_FAILURE() << "not refused: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(CpuRepack, WhatDoesNotFitIsRefusedByName) {
  expect_refused("w13: expected int8 [num_experts, N, K / 2], got int32 [3, 1024, 512]",
                 [](StackedWeights& w) { w.w13.tensor.dtype = DType::kInt32; });
  expect_refused("w2: expected int32 [num_experts, N, K / 8], got int8", [](StackedWeights& w) {
    w.weight_layout = WeightLayout::kUint4b8;
    w.w13.tensor.dtype = DType::kInt32, w.w13.tensor.shape = {3, 1024, 128};
  });
  expect_refused("w2: 3 experts of [512, 1024], expected 3 of [hidden 1024, intermediate 512]",
                 [](StackedWeights& w) {
                   w.w2.tensor.shape = {3, 512, 512};
                 });
  expect_refused("w13: 3 experts, hidden 1024, 2 * intermediate 1022", [](StackedWeights& w) {
    w.w13.tensor.shape = {3, 1022, 512};
  });
  expect_refused("w13_scale: expected float32 or bfloat16 [3, 1024, 1024 / G]",
                 [](StackedWeights& w) {
                   w.w13_scale.tensor.shape = {3, 1024, 9};
                 });
  expect_refused("got bfloat16 [3, 1024, 8]",
                 [](StackedWeights& w) { w.scale_layout = ScaleLayout::kInterleaved; });
  expect_refused("w2_scale: bfloat16 for groups of 32, w13_scale: bfloat16 for groups of 128",
                 [](StackedWeights& w) {
                   w.w2_scale.tensor.shape = {3, 1024, 16};
                 });
  expect_refused("the last dimension densest", [](StackedWeights& w) { w.w13.strides[2] = 2; });
  expect_refused("expert 1 gate: strides are negative",
                 [](StackedWeights& w) { w.w13.strides[1] = -512; });
  expect_refused("are not aligned to 2 bytes", [](StackedWeights& w) { w.w13.strides[1] = 511; });
  expect_refused("expert 1 down: no codes",
                 [](StackedWeights& w) { w.w2.tensor.data = nullptr, w.w2.strides[0] = 0; });
}

TEST(CpuRepack, MemoryThatDoesNotFitIsRefused) {
  const auto backend = make_backend({.num_threads = 1});
  const RepackFormat format{.geometry = repack_cases(256, 128)[0].geometry, .num_experts = 3};
  const auto bytes = static_cast<std::int64_t>(packed_bytes(format, Device::Kind::kHost));
  const auto memory = backend->allocate(static_cast<std::size_t>(bytes) + 64);
  const auto refused = [&](std::ptrdiff_t offset, std::int64_t size, Device device) {
    MutableTensorView view;
    view.data = memory->data() + offset, view.dtype = DType::kUInt8;
    view.shape = {size}, view.device = device;
    try {
      (void)ops(*backend).make_room(format, view);
      return std::string();
    } catch (const Error& error) {
      return std::string(error.what());
    }
  };
  EXPECT_EQ(refused(64, bytes, {}), "");
  EXPECT_NE(refused(0, bytes - 1, {}).find("memory has"), std::string::npos);
  EXPECT_NE(refused(1, bytes, {}).find("not aligned to 64"), std::string::npos);
  EXPECT_NE(refused(0, bytes, {Device::Kind::kCuda, 0}).find("another device"), std::string::npos);
}

/// Experts that are not complete compute nothing, and are not taken for complete.
TEST(CpuRepack, AnExpertThatIsMissingIsNamed) {
  const auto backend = make_backend({.num_threads = 1});
  const RepackCase c = repack_cases(256, 128)[0];
  const DeviceStack stack(random_experts(c.geometry, c.scale_dtype, 1), kLayouts[0], *backend);
  const StackedSources found = stacked_sources(stack.weights);
  Experts experts = Experts::make_room(found.format, 8, *backend);
  LocalGroup group =
      LocalGroup::create({.hidden = 256, .intermediate = 128, .max_entries = 8}, *backend);
  const LayerRecipe recipe =
      resolve_recipe(parse_recipe("direct"), Mode::kLowLatency, DispatchDtype::kAuto, {}, "test");
  const auto refused = [](const std::function<void()>& call) {
    try {
      call();
      return std::string();
    } catch (const Error& error) {
      return std::string(error.what());
    }
  };
  const auto add = [&] { (void)group.add_layer(experts, recipe); };
  const std::span<const ExpertSource> all(found.experts);
  experts.repack(0, all.first(1), {});
  experts.repack(2, all.last(1), {});
  EXPECT_EQ(refused([&] { experts.finish_repack({}); }), "expert 1 of 3 has not been repacked");
  EXPECT_NE(refused(add).find("finish_repack() of its experts is missing"), std::string::npos);
  EXPECT_NE(refused([&] { experts.forward(recipe, {}, {}, {}); }).find("finish_repack()"),
            std::string::npos);
  EXPECT_NE(refused([&] { experts.repack(2, all.first(2), {}); }).find("experts [2, 4) are not"),
            std::string::npos);
  experts.repack(1, all.subspan(1, 1), {});
  experts.finish_repack({});
  EXPECT_EQ(refused(add), "");
  EXPECT_EQ(refused([&] { experts.repack(0, all, {}); }), "the experts are repacked already");
}

}  // namespace
}  // namespace sluice::testing
