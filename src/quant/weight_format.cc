#include "sluice/weight_format.h"

#include "core/fail.h"

namespace sluice {
namespace {

[[noreturn]] void fail_format(WeightFormat format) {
  fail(ErrorCode::kInternal, "weight format {} does not exist", static_cast<int>(format));
}

}  // namespace

const char* to_string(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return "int4";
  }
  fail_format(format);
}

WeightFormat parse_weight_format(std::string_view name) {
  if (name == to_string(WeightFormat::kInt4)) return WeightFormat::kInt4;
  fail(ErrorCode::kUnsupported, "weight format '{}' is none of: {}", name,
       to_string(WeightFormat::kInt4));
}

bool allows_group_size(WeightFormat format, int group_size) {
  switch (format) {
    case WeightFormat::kInt4:
      return group_size == 128 || group_size == 32;
  }
  fail_format(format);
}

float max_code_value(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return 8;
  }
  fail_format(format);
}

std::size_t code_bytes(WeightFormat format, std::size_t num_weights) {
  switch (format) {
    case WeightFormat::kInt4:
      return num_weights / 2;
  }
  fail_format(format);
}

}  // namespace sluice
