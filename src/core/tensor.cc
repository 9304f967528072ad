#include "sluice/tensor.h"

#include "core/fail.h"

namespace sluice {

std::size_t size_bytes(DType dtype) noexcept {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kFloat8E4M3:
    case DType::kPackedInt4:
    case DType::kPackedE2M1:
    case DType::kFloat8E8M0:
      return 1;
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

const char* to_string(DType dtype) noexcept {
  switch (dtype) {
    case DType::kUInt8:
      return "uint8";
    case DType::kInt8:
      return "int8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3";
    case DType::kPackedInt4:
      return "packed_int4";
    case DType::kPackedE2M1:
      return "packed_e2m1";
    case DType::kFloat8E8M0:
      return "float8_e8m0";
  }
  return "unknown";
}

Shape::Shape(std::initializer_list<std::int64_t> dims) {
  check_argument(dims.size() <= kMaxRank, "a shape of {} dimensions; at most {}", dims.size(),
                 int{kMaxRank});
  for (const std::int64_t dim : dims) dims_[rank_++] = dim;
}

std::int64_t Shape::num_elements() const noexcept {
  std::int64_t product = 1;
  for (int i = 0; i < rank_; ++i) product *= dims_[i];
  return product;
}

std::string Shape::to_string() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string(dims_[i]);
  return text + "]";
}

}  // namespace sluice
