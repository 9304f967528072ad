// check_tensor.h - refuses tensors that are not what an operation takes.
#pragma once

#include "sluice/tensor.h"

namespace sluice {

/// Throws: kInvalidArgument naming the tensor, what it is and what was expected: for another dtype,
/// shape or device, and for a tensor with elements but no data.
void check_tensor(const char* name, const TensorView& tensor, DType dtype, const Shape& shape,
                  const Device& device);

}  // namespace sluice
