// token_table.h - what every token must look like on the wire, in device memory, so that a kernel
// can compare the rows that arrived.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "exchange/exchange_model.h"
#include "exchange/rounds.h"
#include "sluice/backend.h"
#include "sluice/quant.h"

namespace sluice::testing {

/// Wire bytes of every token, by the scalar definitions, in device memory.
struct TokenTable {
  TokenTable(const Rounds& rounds, WireFormat wire, float static_scale, Backend& backend) {
    const auto tokens = static_cast<std::size_t>(rounds.max_tokens() * rounds.num_ranks());
    const auto hidden = static_cast<std::size_t>(rounds.hidden);
    payload_bytes = wire == WireFormat::kBf16 ? 2 * hidden : hidden;
    const std::size_t scale_bytes = wire_bytes_per_token(wire, rounds.hidden) - payload_bytes;
    x.resize(tokens * hidden);
    std::vector<std::byte> payload(tokens * payload_bytes), scale(tokens * scale_bytes);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t c = 0; c < hidden; ++c) {
        // Four normals of different size per group suffice to tell tokens and channels apart.
        const std::uint64_t bits = mix64(rounds.seed ^ (t * hidden + c) * 0x9e3779b97f4a7c15u);
        const float v = (static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f) *
                        static_cast<float>(1 << (bits & 3));
        x[t * hidden + c] = bf16_from_float(v);
      }
      const auto bytes = wire_bytes(&x[t * hidden], rounds.hidden, wire, static_scale);
      std::memcpy(&payload[t * payload_bytes], bytes.data(), payload_bytes);
      if (scale_bytes > 0) {
        std::memcpy(&scale[t * scale_bytes], &bytes[payload_bytes], scale_bytes);
      }
    }
    num_groups = static_cast<int>(scale_bytes / sizeof(float));
    payload_memory = backend.allocate(std::max<std::size_t>(1, payload.size()));
    scale_memory = backend.allocate(std::max<std::size_t>(1, scale.size()));
    backend.copy_from_host(payload_memory->data(), payload.data(), payload.size(),
                           backend.stream());
    backend.copy_from_host(scale_memory->data(), scale.data(), scale.size(), backend.stream());
  }
  std::vector<std::uint16_t> x;  // [tokens of all ranks, hidden] bf16
  std::size_t payload_bytes = 0;
  int num_groups = 0;
  std::unique_ptr<DeviceBuffer> payload_memory, scale_memory;
};

}  // namespace sluice::testing
