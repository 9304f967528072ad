#include "backend/cpu/row_kernels.h"

#include <bit>
#include <cmath>

#include "core/fail.h"
#include "sluice/quant.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/row_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;  // Every row is a multiple of 16.
using DI = hn::RebindToSigned<DF>;
using DU8 = hn::Rebind<std::uint8_t, DF>;
using DU16 = hn::Rebind<std::uint16_t, DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;

HWY_INLINE VF widen_bf16(const std::uint16_t* x) {
  const DI di;
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(di, hn::LoadU(DU16(), x))));
}

HWY_INLINE VF e4m3_to_f32(const std::uint8_t* codes) {
  const DF df;
  const DI di;
  const VI code = hn::PromoteTo(di, hn::LoadU(DU8(), codes));
  const VI magnitude = hn::And(code, hn::Set(di, 0x7f));
  const VI sign = hn::ShiftLeft<24>(hn::And(code, hn::Set(di, 0x80)));
  const VI subnormal = hn::BitCast(di, hn::Mul(hn::ConvertTo(df, magnitude), hn::Set(df, 0x1p-9f)));
  VI bits = hn::Add(hn::ShiftLeft<20>(magnitude), hn::Set(di, (127 - 7) << 23));
  bits = hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 8)), subnormal, bits);
  bits = hn::IfThenElse(hn::Eq(magnitude, hn::Set(di, 0x7f)), hn::Set(di, 0x7fc00000), bits);
  return hn::BitCast(df, hn::Or(sign, bits));
}

/// e4m3_from_float(), lane by lane.
HWY_INLINE void store_e4m3(VF x, std::uint8_t* codes) {
  const DF df;
  const DI di;
  const VI bits = hn::BitCast(di, x);
  const VI magnitude = hn::And(bits, hn::Set(di, 0x7fffffff));
  const VI sign = hn::And(hn::ShiftRight<24>(bits), hn::Set(di, 0x80));
  const VI subnormal =
      hn::Sub(hn::BitCast(di, hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0x1p14f))),
              hn::Set(di, std::bit_cast<std::int32_t>(0x1p14f)));
  const VI odd = hn::And(hn::ShiftRight<20>(magnitude), hn::Set(di, 1));
  const VI rounded = hn::Add(magnitude, hn::Add(odd, hn::Set(di, (1 << 19) - 1)));
  VI code = hn::Sub(hn::ShiftRight<20>(rounded), hn::Set(di, (127 - 7) << 3));
  const auto at_least = [&](std::int32_t limit) {
    return hn::Gt(magnitude, hn::Set(di, limit - 1));
  };
  code = hn::IfThenElse(at_least(std::bit_cast<std::int32_t>(0x1p-6f)), code, subnormal);
  code = hn::IfThenElse(at_least(std::bit_cast<std::int32_t>(kE4m3Max)), hn::Set(di, 0x7e), code);
  code = hn::Or(sign, code);
  code = hn::IfThenElse(at_least(0x7f800001), hn::Set(di, 0x7f), code);
  hn::StoreU(hn::DemoteTo(DU8(), code), DU8(), codes);
}

/// max |x|, NaN skipped.
HWY_INLINE VF max_magnitude(VF amax, VF x) {
  const VF magnitude = hn::Abs(x);
  return hn::Max(amax, hn::IfThenZeroElse(hn::IsNaN(x), magnitude));
}

/// 128 values -> codes with a scale of their own.
HWY_INLINE float quantize_128(const float* x, GroupScale kind, std::uint8_t* codes) {
  const DF df;
  const std::size_t lanes = hn::Lanes(df);
  VF top = hn::Set(df, kMinGroupAmax);
  for (std::size_t i = 0; i < kGroup; i += lanes) top = max_magnitude(top, hn::LoadU(df, x + i));
  const float amax = hn::GetLane(hn::MaxOfLanes(df, top));
  float scale = amax * (1.0f / kE4m3Max);
  float inverse = kE4m3Max / amax;
  if (kind == GroupScale::kPow2) {
    scale = ceil_pow2(scale);
    inverse = 1.0f / scale;
  }
  const VF factor = hn::Set(df, inverse);
  for (std::size_t i = 0; i < kGroup; i += lanes) {
    store_e4m3(hn::Mul(hn::LoadU(df, x + i), factor), codes + i);
  }
  return scale;
}

/// A row -> codes with one scale, in two passes over it.
float quantize_token(const std::uint16_t* x, std::int64_t width, std::uint8_t* codes) {
  const DF df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  VF top = hn::Set(df, kMinGroupAmax);
  for (std::int64_t i = 0; i < width; i += lanes) top = max_magnitude(top, widen_bf16(x + i));
  const float amax = hn::GetLane(hn::MaxOfLanes(df, top));
  const VF factor = hn::Set(df, kE4m3Max / amax);
  for (std::int64_t i = 0; i < width; i += lanes) {
    store_e4m3(hn::Mul(widen_bf16(x + i), factor), codes + i);
  }
  return amax * (1.0f / kE4m3Max);
}

void quantize_row_impl(const std::uint16_t* x, std::int64_t width, GroupScale kind,
                       std::uint8_t* codes, float* scale) {
  const DF df;
  if (kind == GroupScale::kToken) {
    scale[0] = quantize_token(x, width, codes);
    return;
  }
  HWY_ALIGN float values[kGroup];
  for (std::int64_t g = 0; g < width / kGroup; ++g) {
    for (std::size_t i = 0; i < kGroup; i += hn::Lanes(df)) {
      hn::StoreU(widen_bf16(x + g * kGroup + static_cast<std::int64_t>(i)), df, values + i);
    }
    scale[g] = quantize_128(values, kind, codes + g * kGroup);
  }
}

void quantize_row_static_impl(const std::uint16_t* x, std::int64_t width, float s,
                              std::uint8_t* codes) {
  const DF df;
  const VF inverse = hn::Set(df, 1.0f / s);
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = 0; i < width; i += lanes) {
    store_e4m3(hn::Mul(widen_bf16(x + i), inverse), codes + i);
  }
}

void requantize_row_impl(const std::uint8_t* codes, const float* scale, std::int64_t width,
                         float s1, std::uint8_t* out) {
  const DF df;
  const VF inverse = hn::Set(df, 1.0f / s1);
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = 0; i < width; i += lanes) {
    const VF value = hn::Mul(e4m3_to_f32(codes + i), hn::Set(df, scale[i / kGroup]));
    store_e4m3(hn::Mul(value, inverse), out + i);
  }
}

/// exp(x) to about 2 ulp; 0 far below, infinity far above, any value for NaN. Multiplications and
/// additions are kept apart so that every instruction set gives the same bits.
HWY_INLINE VF exponential(VF x) {
  const DF df;
  const DI di;
  x = hn::Min(hn::Max(x, hn::Set(df, -104.0f)), hn::Set(df, 90.0f));
  const VF n = hn::Round(hn::Mul(x, hn::Set(df, 1.44269504f)));
  // ln 2 in two parts, the first with few enough bits that n times it is exact.
  VF r = hn::Sub(x, hn::Mul(n, hn::Set(df, 0.693359375f)));
  r = hn::Sub(r, hn::Mul(n, hn::Set(df, -2.12194440e-4f)));
  VF p = hn::Set(df, 1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = hn::Add(hn::Mul(p, r), hn::Set(df, c));
  }
  // 2^n in two factors: n reaches from -150 to 130.
  const VI e = hn::ConvertTo(di, n);
  const VI half = hn::ShiftRight<1>(e);
  const auto power = [&](VI k) {
    return hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(k, hn::Set(di, 127))));
  };
  return hn::Mul(hn::Mul(p, power(half)), power(hn::Sub(e, half)));
}

/// x / (1 + exp(-t))
HWY_INLINE VF gated(VF x, VF t) {
  return hn::Div(x, hn::Add(hn::Set(DF(), 1.0f), exponential(hn::Neg(t))));
}

/// min(x, limit) and clamp(x, -limit, limit) where a NaN stays one; Min() may drop it.
HWY_INLINE VF at_most(VF x, VF limit) {
  return hn::IfThenElse(hn::Gt(x, limit), limit, x);
}
HWY_INLINE VF clamped(VF x, VF limit) {
  const VF low = hn::Neg(limit);
  return hn::IfThenElse(hn::Lt(x, low), low, at_most(x, limit));
}

/// tanh(x) to about 4 ulp; a NaN stays one. By its series below 1/4, where 1 - exp(-2 |x|) would
/// cancel; the first term left out is below 2^-28 of x there.
HWY_INLINE VF hyperbolic_tangent(VF x) {
  const DF df;
  const VF magnitude = hn::Abs(x), one = hn::Set(df, 1.0f);
  const VF z = hn::Mul(x, x);
  VF p = hn::Set(df, -1382.0f / 155925);
  for (const float c : {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3}) {
    p = hn::Add(hn::Mul(p, z), hn::Set(df, c));
  }
  const VF near = hn::Mul(x, hn::Add(one, hn::Mul(z, p)));  // -0 stays -0.
  const VF e = exponential(hn::Mul(magnitude, hn::Set(df, -2.0f)));
  const VF far = hn::CopySign(hn::Div(hn::Sub(one, e), hn::Add(one, e)), x);
  const VF y = hn::IfThenElse(hn::Lt(magnitude, hn::Set(df, 0.25f)), near, far);
  return hn::IfThenElse(hn::IsNaN(x), x, y);
}

/// activate(), lane by lane: of each kind what its name says.
struct Swiglu {
  explicit Swiglu(const ActivationFn&) {}
  HWY_INLINE VF operator()(VF g, VF u) const { return hn::Mul(gated(g, g), u); }
};
struct SwigluLimit {
  explicit SwigluLimit(const ActivationFn& fn) : limit(fn.limit) {}
  HWY_INLINE VF operator()(VF gate, VF up) const {
    const VF l = hn::Set(DF(), limit), g = at_most(gate, l);
    return hn::Mul(gated(g, g), clamped(up, l));
  }
  float limit;
};
struct SwigluOai {
  explicit SwigluOai(const ActivationFn& fn) : alpha(fn.alpha), limit(fn.limit) {}
  HWY_INLINE VF operator()(VF gate, VF up) const {
    const DF df;
    const VF l = hn::Set(df, limit), g = at_most(gate, l);
    const VF u = hn::Add(clamped(up, l), hn::Set(df, 1.0f));
    return hn::Mul(gated(g, hn::Mul(g, hn::Set(df, alpha))), u);
  }
  float alpha, limit;
};
struct Situ {
  explicit Situ(const ActivationFn& fn) : beta(fn.beta), linear_beta(fn.linear_beta) {}
  HWY_INLINE VF operator()(VF g, VF u) const {
    const DF df;
    const VF b = hn::Set(df, beta), lb = hn::Set(df, linear_beta);
    const VF a = gated(hn::Mul(b, hyperbolic_tangent(hn::Div(g, b))), g);
    return hn::Mul(a, hn::Mul(lb, hyperbolic_tangent(hn::Div(u, lb))));
  }
  float beta, linear_beta;
};

template <class Activation>
float activate_quantize_group_as(const ActivationFn& fn, const float* gate, const float* up,
                                 float static_scale, std::uint8_t* codes) {
  const DF df;
  const Activation activation(fn);
  HWY_ALIGN float values[kGroup];
  for (std::size_t i = 0; i < kGroup; i += hn::Lanes(df)) {
    hn::StoreU(activation(hn::LoadU(df, gate + i), hn::LoadU(df, up + i)), df, values + i);
  }
  if (static_scale == 0) return quantize_128(values, GroupScale::kAmax, codes);
  const VF inverse = hn::Set(df, 1.0f / static_scale);
  for (std::size_t i = 0; i < kGroup; i += hn::Lanes(df)) {
    store_e4m3(hn::Mul(hn::LoadU(df, values + i), inverse), codes + i);
  }
  return static_scale;
}

float activate_quantize_group_impl(const ActivationFn& fn, const float* gate, const float* up,
                                   float static_scale, std::uint8_t* codes) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      return activate_quantize_group_as<Swiglu>(fn, gate, up, static_scale, codes);
    case ActivationKind::kSwigluLimit:
      return activate_quantize_group_as<SwigluLimit>(fn, gate, up, static_scale, codes);
    case ActivationKind::kSwigluOai:
      return activate_quantize_group_as<SwigluOai>(fn, gate, up, static_scale, codes);
    case ActivationKind::kSitu:
      return activate_quantize_group_as<Situ>(fn, gate, up, static_scale, codes);
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(fn.kind));
}

void round_to_bf16_impl(const float* x, std::int64_t n, std::uint16_t* out) {
  const DF df;
  const DI di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = 0; i < n; i += lanes) {
    const VI bits = hn::BitCast(di, hn::LoadU(df, x + i));
    const VI magnitude = hn::And(bits, hn::Set(di, 0x7fffffff));
    const VI top = hn::And(hn::ShiftRight<16>(bits), hn::Set(di, 0xffff));
    const VI sign = hn::And(top, hn::Set(di, 0x8000));
    const VI odd = hn::And(hn::ShiftRight<16>(magnitude), hn::Set(di, 1));
    const VI rounded = hn::ShiftRight<16>(hn::Add(magnitude, hn::Add(odd, hn::Set(di, 0x7fff))));
    const auto is_nan = hn::Gt(magnitude, hn::Set(di, 0x7f800000));
    const VI result = hn::IfThenElse(is_nan, hn::Or(top, hn::Set(di, 0x40)), hn::Or(rounded, sign));
    hn::StoreU(hn::DemoteTo(DU16(), result), DU16(), out + i);
  }
}

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {

HWY_EXPORT(quantize_row_impl);
HWY_EXPORT(quantize_row_static_impl);
HWY_EXPORT(requantize_row_impl);
HWY_EXPORT(activate_quantize_group_impl);
HWY_EXPORT(round_to_bf16_impl);

void quantize_row(const std::uint16_t* x, std::int64_t width, GroupScale kind, std::uint8_t* codes,
                  float* scale) {
  HWY_DYNAMIC_DISPATCH(quantize_row_impl)(x, width, kind, codes, scale);
}
void quantize_row_static(const std::uint16_t* x, std::int64_t width, float s, std::uint8_t* codes) {
  HWY_DYNAMIC_DISPATCH(quantize_row_static_impl)(x, width, s, codes);
}
void requantize_row(const std::uint8_t* codes, const float* scale, std::int64_t width, float s1,
                    std::uint8_t* out) {
  HWY_DYNAMIC_DISPATCH(requantize_row_impl)(codes, scale, width, s1, out);
}
float activate_quantize_group(const ActivationFn& fn, const float* gate, const float* up,
                              float static_scale, std::uint8_t* codes) {
  return HWY_DYNAMIC_DISPATCH(activate_quantize_group_impl)(fn, gate, up, static_scale, codes);
}
void round_to_bf16(const float* x, std::int64_t n, std::uint16_t* out) {
  HWY_DYNAMIC_DISPATCH(round_to_bf16_impl)(x, n, out);
}

}  // namespace sluice::cpu
#endif
