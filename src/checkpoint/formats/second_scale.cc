#include "checkpoint/formats/second_scale.h"

#include <algorithm>

#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {

void check_second_scale(const TensorRef& second, const TensorRef& scale, const TensorView& scales) {
  // Both scales may be rounded to bf16: 2^-9 each.
  constexpr float kRounding = 1.01f;
  const float limit = kE4m3Max * read_positive(second, "FP8 scale");
  float largest = 0;
  for (std::int64_t i = 0; i < scales.shape.num_elements(); ++i) {
    largest = std::max(largest, scale_value(scales, i));
  }
  if (7 * largest <= kRounding * limit) return;
  fail(ErrorCode::kUnsupported,
       "{}: 7 times the largest scale is {}, above 448 times {}, which is {}: scales that are "
       "relative to a second one are not supported",
       place(scale), 7 * largest, second.entry.name, limit);
}

}  // namespace sluice
