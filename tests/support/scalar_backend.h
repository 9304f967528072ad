// scalar_backend.h - the operations of a backend in the plainest code: for tests that must not
// depend on a fast one.
#pragma once

#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "backend/ops.h"
#include "quant/row_cast.h"
#include "sluice/quant.h"
#include "support/scalar_memory.h"

namespace sluice::testing {

class ScalarBackend : public BackendOps {
 public:
  [[nodiscard]] Device device() const noexcept override { return {}; }
  [[nodiscard]] std::string description() const override { return "scalar"; }
  [[nodiscard]] double measure_read_bandwidth() override { return 1e9; }
  [[nodiscard]] double measure_arithmetic_rate() override { return 1e9; }
  [[nodiscard]] std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes) override {
    return std::make_unique<ScalarBuffer>(bytes);
  }
  void copy_to_host(void* host, const void* device, std::size_t bytes, Stream) override {
    std::memcpy(host, device, bytes);
  }
  void copy_from_host(void* device, const void* host, std::size_t bytes, Stream) override {
    std::memcpy(device, host, bytes);
  }
  void copy_on_device(void* to, const void* from, std::size_t bytes, Stream) override {
    std::memcpy(to, from, bytes);
  }

  [[nodiscard]] std::unique_ptr<PreparedExperts> prepare(const ExpertWeights& weights) override {
    return std::make_unique<ScalarExperts>(weights);
  }

  [[nodiscard]] std::unique_ptr<ExpertBuilder> make_builder(const ExpertWeights& shapes) override {
    return std::make_unique<ScalarBuilder>(shapes);
  }
  [[nodiscard]] std::unique_ptr<ExpertPacker> make_packer(const PackerSizes& sizes) override {
    return std::make_unique<ScalarPacker>(sizes);
  }

  void quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2, const Fp8Rows& out,
                Stream) override {
    std::vector<float> values(static_cast<std::size_t>(out.width));
    for_each_row(rows, [&](std::int64_t row) {
      for (std::int64_t i = 0; i < out.width; ++i)
        values[i] = bf16_to_float(x[row * out.width + i]);
      quantize_row(values, pow2, row, out);
    });
  }

  void requantize_rows(const Fp8RowsView& in, std::int64_t row, const Fp8Rows& out) {
    for (std::int64_t g = 0; g < in.width / kActivationGroup; ++g) {
      const std::int64_t at = g * kActivationGroup;
      sluice::requantize({in.row(row) + at, kActivationGroup},
                         in.scale[row * (in.width / kActivationGroup) + g], out.static_scale,
                         {out.row(row) + at, kActivationGroup});
    }
  }
  void requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                  Stream) override {
    for_each_row(rows, [&](std::int64_t row) { requantize_rows(in, row, out); });
  }

  void expert_stage(const PreparedExperts& experts, const Fp8RowsView& in, const RowRanges& rows,
                    const Fp8Rows& h, std::uint16_t* out, Stream, ExpertStageTimes*) override {
    const ExpertWeights& w = static_cast<const ScalarExperts&>(experts).weights;
    for (int e = 0; e < rows.num_experts; ++e) {
      const Expert& expert = w.experts[static_cast<std::size_t>(e)];
      for (std::int64_t r = 0; r < rows.num_rows(e); ++r) {
        const std::int64_t row = rows.first_row(e) + r;
        const std::vector<float> gate = multiply(expert.gate, in, row);
        const std::vector<float> up = multiply(expert.up, in, row);
        std::vector<float> product(gate.size());
        for (std::size_t i = 0; i < product.size(); ++i) {
          product[i] = activate(w.geometry.activation, gate[i], up[i]);
        }
        quantize_row(product, false, row, h);
        const std::vector<float> y = multiply(expert.down, h, row);
        for (std::int64_t i = 0; i < in.width; ++i) out[row * in.width + i] = bf16_from_float(y[i]);
      }
    }
  }

  void gather_tokens(const TokenRows& tokens, const EntryRows& entries, const Fp8Rows& out,
                     Stream) override {
    std::int32_t next = 0;
    for (int e = 0; e < entries.num_experts; ++e) {
      entries.begin[e] = next;
      for (std::int64_t i = 0; i < entries.num_tokens * entries.num_topk; ++i) {
        const std::int64_t id = entries.wide_idx
                                    ? static_cast<const std::int64_t*>(entries.topk_idx)[i]
                                    : static_cast<const std::int32_t*>(entries.topk_idx)[i];
        const bool is_first = e == 0;
        if (is_first) entries.row_of[i] = -1;
        if (id != entries.first_expert + e) continue;
        entries.row_of[i] = next;
        write_token(tokens, i / entries.num_topk, out, next++);
      }
      entries.count[e] = next - static_cast<std::int32_t>(entries.begin[e]);
    }
  }

  void sum_entries(const EntrySums& s, Stream) override {
    for (std::int64_t t = 0; t < s.num_tokens; ++t) {
      for (std::int64_t i = 0; i < s.width; ++i) {
        float sum = 0;
        for (std::int64_t entry = t * s.num_topk; entry < (t + 1) * s.num_topk; ++entry) {
          if (s.row_of[entry] < 0) continue;
          sum += s.weights[entry] * bf16_to_float(s.rows[s.row_of[entry] * s.width + i]);
        }
        s.y[t * s.width + i] = bf16_from_float(sum * s.factor);
      }
    }
  }

 protected:
  /// sum a[k] * w[k] of one scale group.
  [[nodiscard]] virtual float sum_of_group(const double* a, const double* w, int size) const {
    float sum = 0;
    for (int k = 0; k < size; ++k) sum += static_cast<float>(w[k]) * static_cast<float>(a[k]);
    return sum;
  }

 private:
  static void write_token(const TokenRows& tokens, std::int64_t t, const Fp8Rows& out,
                          std::int64_t row) {
    CastRow cast;
    std::vector<float> values(static_cast<std::size_t>(out.width));
    for (std::int64_t i = 0; i < out.width; ++i) {
      values[i] = tokens.x != nullptr ? bf16_to_float(tokens.x[t * out.width + i]) : 0;
    }
    if (tokens.x != nullptr) {
      cast = cast_row(tokens.first, values, out.static_scale);
    } else {
      cast.codes.assign(tokens.coded.row(t), tokens.coded.row(t) + out.width);
      const std::int64_t scales = tokens.coded.num_scales();
      for (std::int64_t g = 0; g < scales; ++g) {
        cast.scales.push_back(tokens.coded.scale_of(t, g));
      }
    }
    if (tokens.second != Cast::kNone) {
      cast = cast_row(tokens.second, cast.values(), out.static_scale);
    }
    std::memcpy(out.row(row), cast.codes.data(), cast.codes.size());
    if (out.scale == nullptr) return;
    std::memcpy(out.scale + row * out.num_scales(), cast.scales.data(),
                cast.scales.size() * sizeof(float));
  }

  template <class Body>
  static void for_each_row(const RowRanges& rows, const Body& body) {
    for (int e = 0; e < rows.num_experts; ++e) {
      for (std::int64_t r = 0; r < rows.num_rows(e); ++r) body(rows.first_row(e) + r);
    }
  }

  static void quantize_row(const std::vector<float>& values, bool pow2, std::int64_t row,
                           const Fp8Rows& out) {
    std::uint8_t* codes = out.row(row);
    if (out.scale == nullptr) {
      quantize_static(values, out.static_scale, {codes, values.size()});
      return;
    }
    const std::int64_t scales = out.num_scales();
    const auto size = static_cast<std::size_t>(out.width / scales);
    for (std::int64_t g = 0; g < scales; ++g) {
      const std::span<const float> group{values.data() + static_cast<std::size_t>(g) * size, size};
      const std::span<std::uint8_t> to{codes + static_cast<std::size_t>(g) * size, size};
      out.scale[row * scales + g] =
          pow2 ? quantize_group_pow2(group, to) : quantize_group(group, to);
    }
  }

  std::vector<float> multiply(const QuantMatrix& m, const Fp8RowsView& in, std::int64_t row) const {
    const std::int64_t groups = m.k() / m.group_size;
    std::vector<double> a(static_cast<std::size_t>(m.group_size)), w(a.size());
    std::vector<float> out(static_cast<std::size_t>(m.n()));
    for (std::int64_t n = 0; n < m.n(); ++n) {
      float sum = 0;
      for (std::int64_t g = 0; g < groups; ++g) {
        for (std::int64_t k = g * m.group_size, i = 0; i < m.group_size; ++k, ++i) {
          w[i] = code_value(m.format, m.codes.as<std::uint8_t>() + n * (m.k() / 2), k);
          a[i] = e4m3_to_float(in.row(row)[k]);
        }
        const float partial = sum_of_group(a.data(), w.data(), m.group_size);
        const float ws = scale_value(m.scales, n * groups + g);
        const std::int64_t ag = g * m.group_size / kActivationGroup;
        const float as =
            in.scale ? in.scale[row * (in.width / kActivationGroup) + ag] : in.static_scale;
        sum += partial * (ws * as);
      }
      out[static_cast<std::size_t>(n)] = sum;
    }
    return out;
  }
};

}  // namespace sluice::testing
