#include "quant/row_cast.h"

#include "core/fail.h"

namespace sluice {
namespace {

using QuantizeGroup = float (*)(std::span<const float>, std::span<std::uint8_t>) noexcept;

CastRow cast_groups(QuantizeGroup quantize, std::span<const float> values) {
  SLUICE_ASSERT(values.size() % kActivationGroup == 0);
  CastRow row{.codes = std::vector<std::uint8_t>(values.size()), .scales = {}};
  for (std::size_t begin = 0; begin < values.size(); begin += kActivationGroup) {
    row.scales.push_back(quantize(values.subspan(begin, kActivationGroup),
                                  std::span(row.codes).subspan(begin, kActivationGroup)));
  }
  return row;
}

}  // namespace

std::vector<float> CastRow::values() const {
  std::vector<float> values(codes.size());
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = e4m3_to_float(codes[i]) * scale_of(i);
  return values;
}

CastRow cast_row(Cast cast, std::span<const float> values, float static_scale) {
  switch (cast) {
    case Cast::kNone:
      break;
    case Cast::kGroup:
      return cast_groups(quantize_group, values);
    case Cast::kGroupPow2:
      return cast_groups(quantize_group_pow2, values);
    case Cast::kToken: {
      CastRow row{.codes = std::vector<std::uint8_t>(values.size()), .scales = {0}};
      row.scales[0] = quantize_group(values, row.codes);
      return row;
    }
    case Cast::kStatic:
    case Cast::kStaticPow2: {
      CastRow row{.codes = std::vector<std::uint8_t>(values.size()), .scales = {static_scale}};
      quantize_static(values, static_scale, row.codes);
      return row;
    }
  }
  fail(ErrorCode::kInternal, "cast {} gives no e4m3 row", to_string(cast));
}

}  // namespace sluice
