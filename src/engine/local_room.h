// local_room.h - the memory between the stages of the calls of a LocalGroup.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "engine/experts_impl.h"
#include "sluice/local_experts.h"

namespace sluice {

/// Bytes of the rows that experts write, [max_entries, hidden] bf16.
inline std::size_t expert_y_bytes(const LocalGroupConfig& c) {
  return fp8_code_bytes(c.max_entries, c.hidden) * sizeof(std::uint16_t);
}
inline std::size_t row_of_bytes(const LocalGroupConfig& c) {
  return static_cast<std::size_t>(c.max_entries) * sizeof(std::int32_t);
}

/// The memory between the stages of one call. Each part grows by itself: a batch needs fewer of
/// them than tokens do.
struct LocalRoom {
  std::unique_ptr<DeviceBuffer> x_scale;  ///< [rows, hidden / 128] float32
  std::unique_ptr<DeviceBuffer> h_codes, h_scale;
  /// Of tokens: [max_entries, hidden] bf16; until GEMM2 writes a row, its codes lie at its
  /// beginning. Of a batch: codes [rows, hidden] alone.
  std::unique_ptr<DeviceBuffer> rows;
  std::unique_ptr<DeviceBuffer> row_of;  ///< [max_entries] int32
  /// Tokens of all channels, for those who bring the model's own: [max_entries, hidden] bf16; null
  /// where no layer needs it. In padded_x the channels behind the model's are zeros.
  std::unique_ptr<DeviceBuffer> padded_x, padded_y;
  std::vector<std::unique_ptr<DeviceBuffer>> outgrown;  ///< Graphs may use it.

  [[nodiscard]] std::size_t bytes() const noexcept {
    std::size_t sum = 0;
    for (const auto* part : {&x_scale, &h_codes, &h_scale, &rows, &row_of, &padded_x, &padded_y}) {
      if (*part) sum += (*part)->bytes();
    }
    for (const auto& buffer : outgrown) sum += buffer->bytes();
    return sum;
  }
  void grow(std::unique_ptr<DeviceBuffer>& part, std::size_t bytes, Backend& backend) {
    if (part && part->bytes() >= bytes) return;
    auto larger = backend.allocate(bytes);
    if (part) outgrown.push_back(std::move(part));
    part = std::move(larger);
  }
  void grow_h(std::int64_t max_rows, std::int64_t intermediate, Backend& backend) {
    grow(h_codes, fp8_code_bytes(max_rows, intermediate), backend);
    grow(h_scale, fp8_scale_bytes(max_rows, intermediate), backend);
  }
  /// For calls on tokens.
  void grow_entries(const LocalGroupConfig& c, Backend& backend) {
    grow_h(c.max_entries, c.intermediate, backend);
    grow(x_scale, fp8_scale_bytes(c.max_entries, c.hidden), backend);
    grow(rows, expert_y_bytes(c), backend);
    grow(row_of, row_of_bytes(c), backend);
    if (padded_x) grow_padded(c, backend);
  }
  void grow_padded(const LocalGroupConfig& c, Backend& backend) {
    const std::size_t bytes = expert_y_bytes(c);
    if (padded_x && padded_x->bytes() >= bytes) return;
    grow(padded_y, bytes, backend);
    grow(padded_x, bytes, backend);
    const std::vector<std::byte> zeros(bytes);
    backend.copy_from_host(padded_x->data(), zeros.data(), bytes, {});
    backend.synchronize({});
  }
};

}  // namespace sluice
