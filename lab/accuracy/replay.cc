// Dumps of what a model really fed its layer: one safetensors file with x, topk_idx, topk_weights.
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "checkpoint/safetensors.h"
#include "core/fail.h"
#include "core/regular_file.h"
#include "core/write_text.h"
#include "sluice/lab/accuracy.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

class Dump {
 public:
  explicit Dump(const std::filesystem::path& file)
      : name_(file.string()),
        bytes_(read_text(file)),
        header_(parse_safetensors_header(std::as_bytes(std::span(bytes_)), name_)) {}

  /// A [rows, columns] tensor of one of two dtypes. Throws: naming the tensor and what is wrong.
  [[nodiscard]] const SafetensorsEntry& matrix(const char* tensor, const char* dtype,
                                               const char* other_dtype) const {
    for (const SafetensorsEntry& entry : header_.tensors) {
      if (entry.name != tensor) continue;
      check_argument(entry.dtype == dtype || entry.dtype == other_dtype,
                     "{}: tensor {} is {}, but must be {}{}{}", name_, tensor, entry.dtype, dtype,
                     std::strcmp(dtype, other_dtype) ? " or " : "",
                     std::strcmp(dtype, other_dtype) ? other_dtype : "");
      check_argument(entry.shape.size() == 2, "{}: tensor {} has shape {}, but must have two axes",
                     name_, tensor, to_string(entry.shape));
      return entry;
    }
    fail(ErrorCode::kInvalidArgument,
         "{}: tensor {} is missing; a dump holds x, topk_idx and topk_weights", name_, tensor);
  }

  /// Elements may lie at any address.
  template <class T>
  [[nodiscard]] std::vector<T> read(const SafetensorsEntry& entry) const {
    std::vector<T> values((entry.end - entry.begin) / sizeof(T));
    if (!values.empty()) {
      std::memcpy(values.data(), bytes_.data() + header_.data_begin + entry.begin,
                  values.size() * sizeof(T));
    }
    return values;
  }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }

 private:
  std::string name_;
  std::string bytes_;
  SafetensorsHeader header_;
};

void read_x(const Dump& dump, const SafetensorsEntry& entry, Workload& tokens) {
  if (entry.dtype == "BF16") {
    tokens.x = dump.read<std::uint16_t>(entry);
  } else {
    for (const float v : dump.read<float>(entry)) tokens.x.push_back(bf16_from_float(v));
  }
  const auto hidden = static_cast<std::size_t>(tokens.hidden);
  for (std::size_t i = 0; i < tokens.x.size(); ++i) {
    const float value = bf16_to_float(tokens.x[i]);
    check_argument(std::isfinite(value), "{}: x[{}, {}] = {} is not finite in bf16", dump.name(),
                   i / hidden, i % hidden, value);
  }
}

void read_routing(const Dump& dump, const SafetensorsEntry& idx, const SafetensorsEntry& weights,
                  const ModelGeometry& geometry, Workload& tokens) {
  std::vector<std::int64_t> experts;
  if (idx.dtype == "I64") {
    experts = dump.read<std::int64_t>(idx);
  } else {
    for (const std::int32_t e : dump.read<std::int32_t>(idx)) experts.push_back(e);
  }
  tokens.topk_weights = dump.read<float>(weights);
  const auto topk = static_cast<std::size_t>(tokens.num_topk);
  for (std::size_t i = 0; i < experts.size(); ++i) {
    check_argument(experts[i] >= -1 && experts[i] < geometry.num_experts,
                   "{}: topk_idx[{}, {}] = {} is neither -1 nor one of the layer's {} experts",
                   dump.name(), i / topk, i % topk, experts[i], geometry.num_experts);
    check_argument(std::isfinite(tokens.topk_weights[i]),
                   "{}: topk_weights[{}, {}] = {} is not finite", dump.name(), i / topk, i % topk,
                   tokens.topk_weights[i]);
    tokens.topk_idx.push_back(static_cast<std::int32_t>(experts[i]));
  }
}

/// Rows of `width` become rows of `padded`, with zeros behind.
void pad_rows(std::vector<std::uint16_t>& x, int width, int padded) {
  if (width == padded) return;
  std::vector<std::uint16_t> wide(x.size() / static_cast<std::size_t>(width) *
                                  static_cast<std::size_t>(padded));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t row = i / static_cast<std::size_t>(width);
    wide[row * static_cast<std::size_t>(padded) + i % static_cast<std::size_t>(width)] = x[i];
  }
  x = std::move(wide);
}

}  // namespace

TokenSuite read_dump(const std::filesystem::path& file, const ModelGeometry& geometry) {
  const Dump dump(file);
  const SafetensorsEntry& x = dump.matrix("x", "BF16", "F32");
  const SafetensorsEntry& idx = dump.matrix("topk_idx", "I32", "I64");
  const SafetensorsEntry& weights = dump.matrix("topk_weights", "F32", "F32");
  const int width = geometry.token_width();
  check_argument(x.shape[1] == static_cast<std::uint64_t>(width),
                 "{}: x has shape {}, but the layer's hidden is {}", dump.name(),
                 to_string(x.shape), width);
  check_argument(x.shape[0] > 0 && x.shape[0] < (1u << 24),
                 "{}: x has shape {}: no or too many tokens", dump.name(), to_string(x.shape));
  for (const SafetensorsEntry* entry : {&idx, &weights}) {
    check_argument(entry->shape[0] == x.shape[0] &&
                       entry->shape[1] == static_cast<std::uint64_t>(geometry.num_topk),
                   "{}: {} has shape {}, but x has {} tokens and the layer is top-{}", dump.name(),
                   entry->name, to_string(entry->shape), x.shape[0], geometry.num_topk);
  }
  TokenSuite suite{.name = "replay", .tokens = {}, .calibration = {}};
  suite.tokens.num_tokens = static_cast<std::int64_t>(x.shape[0]);
  suite.tokens.hidden = width;
  suite.tokens.num_topk = geometry.num_topk;
  read_x(dump, x, suite.tokens);
  pad_rows(suite.tokens.x, width, geometry.hidden);
  suite.tokens.hidden = geometry.hidden;
  read_routing(dump, idx, weights, geometry, suite.tokens);
  return suite;
}

void write_dump(const std::filesystem::path& file, const Workload& tokens) {
  const auto rows = static_cast<std::uint64_t>(tokens.num_tokens);
  const auto hidden = static_cast<std::uint64_t>(tokens.hidden);
  const auto topk = static_cast<std::uint64_t>(tokens.num_topk);
  std::array<SafetensorsEntry, 3> entries = {
      SafetensorsEntry{.name = "topk_idx", .dtype = "I32", .shape = {rows, topk}},
      SafetensorsEntry{.name = "topk_weights", .dtype = "F32", .shape = {rows, topk}},
      SafetensorsEntry{.name = "x", .dtype = "BF16", .shape = {rows, hidden}}};
  std::string text = make_safetensors_header(entries);
  const auto append = [&text](const auto& values) {
    text.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0]));
  };
  append(tokens.topk_idx), append(tokens.topk_weights), append(tokens.x);
  write_text(file, text);
}

}  // namespace sluice
