// stream_order.h - calls on several CUDA streams take turns at memory that they share.
#pragma once

#include <memory>

#include "backend/ops.h"

namespace sluice::cuda {

/// For streams of device `index`, which is current.
[[nodiscard]] std::unique_ptr<StreamOrder> make_stream_order(int index);

}  // namespace sluice::cuda
