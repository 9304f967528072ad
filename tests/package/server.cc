// A server: links the runtime alone, hands over weights that it holds itself, and runs one layer.
//
// Every weight is 1 / 128 and every activation 1, so gate = up = 1. Each channel of the result is
// silu(1) = 0.7311, whichever experts a token goes to: its router weights sum to 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "sluice/backend.h"
#include "sluice/layer.h"
#include "sluice/transport.h"

namespace {

constexpr int kHidden = 128, kIntermediate = 128, kExperts = 4, kTopk = 2, kTokens = 3;

float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value = 0;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace

int main() {
  const std::vector<std::uint8_t> codes(kHidden * kIntermediate / 2, 0x11);  // Two INT4 ones.
  const std::vector<float> scales(kHidden, 1.0f / 128);  // One group of 128 in each row.
  sluice::QuantMatrix matrix;
  matrix.codes = {codes.data(), sluice::DType::kPackedInt4, {kHidden, kIntermediate / 2}};
  matrix.scales = {scales.data(), sluice::DType::kFloat32, {kHidden, 1}};

  sluice::LayerSpec spec;
  spec.weights.geometry.num_experts = kExperts;
  spec.weights.geometry.num_topk = kTopk;
  spec.weights.geometry.hidden = kHidden;
  spec.weights.geometry.intermediate = kIntermediate;
  spec.weights.experts.assign(kExperts, {.gate = matrix, .up = matrix, .down = matrix});

  const auto backend = sluice::make_backend({.num_threads = 1});
  const auto transports = sluice::make_inproc_transports(1);
  auto group = sluice::LayerGroup::create(
      {.geometry = spec.weights.geometry, .low_latency = {.max_tokens_per_rank = kTokens}},
      *transports.front(), *backend);
  sluice::Layer layer = group.add_layer(spec);

  const std::vector<std::uint16_t> x(kTokens * kHidden, 0x3f80);  // bf16 1.0
  const std::vector<std::int32_t> topk_idx = {0, 1, 1, 3, 2, 0};
  const std::vector<float> topk_weights(kTokens * kTopk, 0.5f);
  std::vector<std::uint16_t> y(x.size());
  const sluice::Routing routing = {
      {topk_idx.data(), sluice::DType::kInt32, {kTokens, kTopk}},
      {topk_weights.data(), sluice::DType::kFloat32, {kTokens, kTopk}}};
  sluice::MutableTensorView out;
  out.data = y.data(), out.dtype = sluice::DType::kBFloat16, out.shape = {kTokens, kHidden};
  layer.forward(sluice::Mode::kLowLatency, {x.data(), sluice::DType::kBFloat16, {kTokens, kHidden}},
                routing, out, {});

  const float expected = 1.0f / (1.0f + std::exp(-1.0f));
  for (const std::uint16_t bits : y) {
    if (std::fabs(from_bf16(bits) - expected) > 0x1p-8f) {  // bf16's spacing there.
      std::printf("server: %g where %g is expected\n", static_cast<double>(from_bf16(bits)),
                  static_cast<double>(expected));
      return 1;
    }
  }
  return 0;
}
