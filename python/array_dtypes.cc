#include "array_dtypes.h"

#include <fmt/format.h>

namespace sluice::python {
namespace {

using Code = nb::dlpack::dtype_code;

nb::dlpack::dtype make_dtype(Code code, int bits) {
  return {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
}

}  // namespace

bool is_dtype(const nb::dlpack::dtype& seen, DType wanted) {
  const auto is = [&](Code code, int bits) { return seen == make_dtype(code, bits); };
  switch (wanted) {
    case DType::kUInt8:
      return is(Code::UInt, 8);
    case DType::kInt8:
      return is(Code::Int, 8);
    case DType::kInt32:
      return is(Code::Int, 32);
    case DType::kInt64:
      return is(Code::Int, 64);
    case DType::kFloat32:
      return is(Code::Float, 32);
    case DType::kFloat64:
      return is(Code::Float, 64);
    case DType::kBFloat16:
      return is(Code::Bfloat, 16) || is(Code::UInt, 16);
    case DType::kFloat8E4M3:
      return is(Code::Float8_E4M3FN, 8) || is(Code::UInt, 8);
    case DType::kPackedInt4:
    case DType::kPackedE2M1:
      return is(Code::UInt, 8) || is(Code::Int, 8);
    case DType::kFloat8E8M0:
      return is(Code::UInt, 8);
  }
  return false;
}

const char* describe(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bfloat16 (or its bits as uint16)";
    case DType::kFloat8E4M3:
      return "e4m3 (as uint8)";
    case DType::kPackedInt4:
      return "packed int4 (as uint8 or int8)";
    case DType::kPackedE2M1:
      return "packed e2m1 (as uint8 or int8)";
    case DType::kFloat8E8M0:
      return "e8m0 (as uint8)";
    default:
      return to_string(dtype);
  }
}

std::string describe(const nb::dlpack::dtype& dtype) {
  switch (static_cast<Code>(dtype.code)) {
    case Code::Int:
      return fmt::format("int{}", dtype.bits);
    case Code::UInt:
      return fmt::format("uint{}", dtype.bits);
    case Code::Float:
      return fmt::format("float{}", dtype.bits);
    case Code::Bfloat:
      return fmt::format("bfloat{}", dtype.bits);
    case Code::Complex:
      return fmt::format("complex{}", dtype.bits);
    case Code::Bool:
      return "bool";
    case Code::Float8_E4M3FN:
      return "float8_e4m3fn";
    default:
      return fmt::format("a type of {} bits that is none of ours", dtype.bits);
  }
}

const char* numpy_name(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "uint16";
    case DType::kFloat8E4M3:
    case DType::kPackedInt4:
    case DType::kPackedE2M1:
    case DType::kFloat8E8M0:
      return "uint8";
    default:
      return to_string(dtype);
  }
}

nb::dlpack::dtype export_dtype(DType dtype, bool plain) {
  switch (dtype) {
    case DType::kBFloat16:
      return plain ? make_dtype(Code::UInt, 16) : make_dtype(Code::Bfloat, 16);
    case DType::kFloat8E4M3:
      return make_dtype(plain ? Code::UInt : Code::Float8_E4M3FN, 8);
    case DType::kInt8:
      return make_dtype(Code::Int, 8);
    case DType::kInt32:
      return make_dtype(Code::Int, 32);
    case DType::kInt64:
      return make_dtype(Code::Int, 64);
    case DType::kFloat32:
      return make_dtype(Code::Float, 32);
    case DType::kFloat64:
      return make_dtype(Code::Float, 64);
    default:
      return make_dtype(Code::UInt, 8);
  }
}

}  // namespace sluice::python
