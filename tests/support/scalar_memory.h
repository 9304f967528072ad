// scalar_memory.h - what ScalarBackend holds: buffers, and copies of experts as they are.
#pragma once

#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "backend/ops.h"

namespace sluice::testing {

struct ScalarBuffer final : DeviceBuffer {
  explicit ScalarBuffer(std::size_t bytes) : bytes_(bytes), data_(new std::byte[bytes + 128]) {}
  [[nodiscard]] std::byte* data() const noexcept override { return data_.get(); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }
  std::size_t bytes_;
  std::unique_ptr<std::byte[]> data_;
};

struct ScalarExperts final : PreparedExperts {
  explicit ScalarExperts(const ExpertWeights& w) : weights(w) {}
  [[nodiscard]] std::size_t bytes() const noexcept override { return weights.bytes(); }
  void copy_to_host(std::byte* host) const override {
    for (const Expert& e : weights.experts) {
      for (const QuantMatrix* m : {&e.gate, &e.up, &e.down}) {
        for (const TensorView* view : {&m->codes, &m->scales}) {
          std::memcpy(host, view->data, view->bytes());
          host += view->bytes();
        }
      }
    }
  }
  ExpertWeights weights;
};

/// Keeps a copy of what is added.
struct ScalarBuilder final : ExpertBuilder {
  explicit ScalarBuilder(const ExpertWeights& shapes)
      : experts(std::make_unique<ScalarExperts>(shapes)), copies(shapes.experts.size() * 6) {}
  [[nodiscard]] std::unique_ptr<PreparedExperts> finish() override {
    experts->weights.storage =
        std::make_shared<std::vector<std::vector<std::byte>>>(std::move(copies));
    return std::move(experts);
  }
  /// Keeps the scales; where the codes go, which have their room already.
  std::vector<std::byte>& begin(int index, MatrixRole role, const TensorView& scales) {
    Expert& expert = experts->weights.experts[static_cast<std::size_t>(index)];
    QuantMatrix* const all[] = {&expert.gate, &expert.up, &expert.down};
    QuantMatrix& matrix = *all[static_cast<std::size_t>(role)];
    const std::size_t at = static_cast<std::size_t>(index) * 6 + static_cast<std::size_t>(role) * 2;
    copies[at].reserve(matrix.codes.bytes());
    copies[at + 1].assign(scales.as<std::byte>(), scales.as<std::byte>() + scales.bytes());
    matrix.codes.data = copies[at].data();
    matrix.scales.data = copies[at + 1].data();
    return copies[at];
  }
  std::unique_ptr<ScalarExperts> experts;
  std::vector<std::vector<std::byte>> copies;
};

struct ScalarPacker final : ExpertPacker {
  explicit ScalarPacker(const PackerSizes& sizes)
      : scales(sizes.scales_bytes + 256), piece(sizes.piece_bytes + 256) {}
  static std::span<std::byte> aligned(std::vector<std::byte>& memory) {
    void* at = memory.data();
    std::size_t room = memory.size();
    std::align(256, memory.size() - 256, at, room);
    return {static_cast<std::byte*>(at), memory.size() - 256};
  }
  [[nodiscard]] std::span<std::byte> next_scales() override { return aligned(scales); }
  [[nodiscard]] std::span<std::byte> next_piece() override { return aligned(piece); }
  void add_scales(ExpertBuilder& to, int index, MatrixRole role, const TensorView& view) override {
    codes = &static_cast<ScalarBuilder&>(to).begin(index, role, view);
  }
  void add_rows(std::span<const std::byte> rows) override {
    codes->insert(codes->end(), rows.begin(), rows.end());
  }
  void flush() override {}
  [[nodiscard]] std::size_t host_bytes() const noexcept override {
    return scales.size() + piece.size();
  }
  std::vector<std::byte> scales, piece;
  std::vector<std::byte>* codes = nullptr;
};

}  // namespace sluice::testing
