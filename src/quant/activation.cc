#include "sluice/activation.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <span>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

struct Parameter {
  std::string_view name;
  float ActivationFn::*field;
};

constexpr std::array<Parameter, 4> kParameters = {{{"alpha", &ActivationFn::alpha},
                                                   {"limit", &ActivationFn::limit},
                                                   {"beta", &ActivationFn::beta},
                                                   {"linear_beta", &ActivationFn::linear_beta}}};

std::string_view name_of(ActivationKind kind) {
  switch (kind) {
    case ActivationKind::kSwiglu:
    case ActivationKind::kSwigluLimit:
      return "swiglu";
    case ActivationKind::kSwigluOai:
      return "swiglu-oai";
    case ActivationKind::kSitu:
      return "situ";
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(kind));
}

/// The parameters that a kind has, in the order in which they are written.
std::span<const Parameter> parameters_of(ActivationKind kind) {
  const std::span all(kParameters);
  switch (kind) {
    case ActivationKind::kSwiglu:
      return {};
    case ActivationKind::kSwigluLimit:
      return all.subspan(1, 1);
    case ActivationKind::kSwigluOai:
      return all.subspan(0, 2);
    case ActivationKind::kSitu:
      return all.subspan(2, 2);
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(kind));
}

float parse_parameter(std::string_view text, std::string_view name, std::string_view value) {
  float number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  check_argument(error == std::errc() && end == value.data() + value.size(),
                 "activation '{}': {} = '{}' is not a float32", text, name, value);
  return number;
}

/// "limit=10,alpha=2" into the fields of `fn`.
void parse_parameters(std::string_view text, std::string_view list, ActivationFn& fn) {
  while (!list.empty()) {
    const std::string_view item = list.substr(0, list.find(','));
    list.remove_prefix(std::min(list.size(), item.size() + 1));
    const std::string_view name = item.substr(0, item.find('='));
    const auto* const found = std::ranges::find(kParameters, name, &Parameter::name);
    check_argument(found != kParameters.end() && name.size() < item.size(),
                   "activation '{}': '{}' is not alpha=, limit=, beta= or linear_beta=", text,
                   item);
    check_argument(fn.*found->field == 0, "activation '{}': {} is given twice", text, name);
    fn.*found->field = parse_parameter(text, name, item.substr(name.size() + 1));
  }
}

/// min and max as comparisons, which a NaN passes: std::fmin() and its kin drop it.
float at_most(float x, float limit) {
  return x > limit ? limit : x;
}
float clamped(float x, float limit) {
  return x < -limit ? -limit : at_most(x, limit);
}

float sigmoid(float x) {
  return 1.0f / (1.0f + std::exp(-x));
}

}  // namespace

void check_activation(const ActivationFn& fn) {
  const std::span<const Parameter> own = parameters_of(fn.kind);
  for (const Parameter& p : kParameters) {
    const float value = fn.*p.field;
    if (std::ranges::find(own, p.name, &Parameter::name) == own.end()) {
      check_argument(value == 0, "activation {}: {} = {} is not a parameter of it",
                     name_of(fn.kind), p.name, value);
    } else {
      check_argument(std::isfinite(value) && value > 0,
                     "activation {}: {} = {} must be finite and above 0", name_of(fn.kind), p.name,
                     value);
    }
  }
}

std::string to_string(const ActivationFn& fn) {
  std::string text(name_of(fn.kind));
  char separator = ':';
  for (const Parameter& p : parameters_of(fn.kind)) {
    text += fmt::format("{}{}={}", separator, p.name, fn.*p.field);
    separator = ',';
  }
  return text;
}

ActivationFn parse_activation(std::string_view text) {
  const std::string_view name = text.substr(0, text.find(':'));
  ActivationFn fn;
  if (name == "swiglu") {
    fn.kind = name == text ? ActivationKind::kSwiglu : ActivationKind::kSwigluLimit;
  } else if (name == "swiglu-oai") {
    fn.kind = ActivationKind::kSwigluOai;
  } else if (name == "situ") {
    fn.kind = ActivationKind::kSitu;
  } else {
    fail(ErrorCode::kUnsupported,
         "activation '{}' is none of: swiglu, swiglu:limit=L, swiglu-oai:alpha=A,limit=L, "
         "situ:beta=B,linear_beta=LB",
         text);
  }
  if (name != text) parse_parameters(text, text.substr(name.size() + 1), fn);
  check_activation(fn);
  return fn;
}

float activate(const ActivationFn& fn, float gate, float up) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      return swiglu(gate, up);
    case ActivationKind::kSwigluLimit:
      return swiglu(at_most(gate, fn.limit), clamped(up, fn.limit));
    case ActivationKind::kSwigluOai: {
      const float g = at_most(gate, fn.limit), t = fn.alpha * g;
      return g / (1.0f + std::exp(-t)) * (clamped(up, fn.limit) + 1.0f);
    }
    case ActivationKind::kSitu: {
      const float g = fn.beta * std::tanh(gate / fn.beta) * sigmoid(gate);
      return g * (fn.linear_beta * std::tanh(up / fn.linear_beta));
    }
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(fn.kind));
}

}  // namespace sluice
