#include "sluice/weight_format.h"

#include <array>
#include <string>

#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::array kWeightFormats = {WeightFormat::kInt4, WeightFormat::kMxfp4};

[[noreturn]] void fail_format(WeightFormat format) {
  fail(ErrorCode::kInternal, "weight format {} does not exist", static_cast<int>(format));
}

}  // namespace

const char* to_string(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return "int4";
    case WeightFormat::kMxfp4:
      return "mxfp4";
  }
  fail_format(format);
}

WeightFormat parse_weight_format(std::string_view name) {
  std::string known;
  for (const WeightFormat format : kWeightFormats) {
    if (name == to_string(format)) return format;
    known += std::string(known.empty() ? "" : ", ") + to_string(format);
  }
  fail(ErrorCode::kUnsupported, "weight format '{}' is none of: {}", name, known);
}

bool allows_group_size(WeightFormat format, int group_size) {
  switch (format) {
    case WeightFormat::kInt4:
      return group_size == 128 || group_size == 32;
    case WeightFormat::kMxfp4:
      return group_size == 32;
  }
  fail_format(format);
}

float max_code_value(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return 8;
    case WeightFormat::kMxfp4:
      return 6;
  }
  fail_format(format);
}

std::size_t code_bytes(WeightFormat format, std::size_t num_weights) {
  switch (format) {
    case WeightFormat::kInt4:
    case WeightFormat::kMxfp4:
      return num_weights / 2;
  }
  fail_format(format);
}

const char* group_size_refusal(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return "neither 128 nor 32";
    case WeightFormat::kMxfp4:
      return "not mxfp4's 32";
  }
  fail_format(format);
}

DType code_dtype(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return DType::kPackedInt4;
    case WeightFormat::kMxfp4:
      return DType::kPackedE2M1;
  }
  fail_format(format);
}

bool allows_scale_dtype(WeightFormat format, DType dtype) {
  switch (format) {
    case WeightFormat::kInt4:
      return dtype == DType::kFloat32 || dtype == DType::kBFloat16;
    case WeightFormat::kMxfp4:
      return dtype == DType::kFloat8E8M0;
  }
  fail_format(format);
}

const char* scale_dtype_names(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return "float32 or bfloat16";
    case WeightFormat::kMxfp4:
      return "float8_e8m0";
  }
  fail_format(format);
}

}  // namespace sluice
