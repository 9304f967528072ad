#include "sluice/activation.h"

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {

std::string to_string(const ActivationFn& fn) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      return "swiglu";
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(fn.kind));
}

ActivationFn parse_activation(std::string_view name) {
  const ActivationFn swiglu{ActivationKind::kSwiglu};
  if (name == to_string(swiglu)) return swiglu;
  fail(ErrorCode::kUnsupported, "activation '{}' is none of: {}", name, to_string(swiglu));
}

float activate(const ActivationFn& fn, float gate, float up) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      return swiglu(gate, up);
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(fn.kind));
}

}  // namespace sluice
