#include "core/check_tensor.h"

#include <string>

#include "core/fail.h"

namespace sluice {
namespace {

std::string text_of(const Device& device) {
  return device.kind == Device::Kind::kHost ? "host memory" : fmt::format("cuda:{}", device.index);
}

}  // namespace

void check_tensor(const char* name, const TensorView& tensor, DType dtype, const Shape& shape,
                  const Device& device) {
  // Every call of a layer passes here several times: texts are made for what is refused alone.
  check_argument(tensor.dtype == dtype, "{} is {}, expected {}", name, to_string(tensor.dtype),
                 to_string(dtype));
  if (!(tensor.shape == shape)) {
    fail(ErrorCode::kInvalidArgument, "{} has shape {}, expected {}", name,
         tensor.shape.to_string(), shape.to_string());
  }
  check_argument(tensor.data != nullptr || shape.num_elements() == 0, "{} has no data", name);
  if (!(tensor.device == device)) {
    fail(ErrorCode::kInvalidArgument, "{} lives in {}, expected {}", name, text_of(tensor.device),
         text_of(device));
  }
}

}  // namespace sluice
