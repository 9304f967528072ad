#include <fmt/format.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "bindings.h"
#include "sluice/lab/workload.h"

namespace sluice::python {

using namespace nb::literals;

void bind_workload(nb::module_& m) {
  m.def(
      "make_workload",
      [](const ModelGeometry& geometry, std::int64_t num_tokens, std::int64_t first_token,
         std::string_view routing, std::uint64_t seed) {
        if (num_tokens < 0 || first_token < 0 || num_tokens > (std::int64_t{1} << 24)) {
          throw Error(ErrorCode::kInvalidArgument,
                      fmt::format("num_tokens {} is not in [0, 2^24] or first_token {} is negative",
                                  num_tokens, first_token));
        }
        const Workload load = make_workload({.num_experts = geometry.num_experts,
                                             .num_topk = geometry.num_topk,
                                             .hidden = geometry.hidden,
                                             .routing = parse_routing(routing),
                                             .input = InputKind::kRealistic,
                                             .seed = seed},
                                            first_token, num_tokens);
        const Shape slots{num_tokens, load.num_topk};
        return nb::make_tuple(
            export_copy(load.x.data(), DType::kBFloat16, Shape{num_tokens, load.hidden}),
            export_copy(load.topk_idx.data(), DType::kInt32, slots),
            export_copy(load.topk_weights.data(), DType::kFloat32, slots));
      },
      "geometry"_a, "num_tokens"_a, nb::kw_only(), "first_token"_a = 0, "routing"_a = "uniform",
      "seed"_a = 1,
      "The tokens of `sluice run`, fixed by the seed: (x [num_tokens, hidden] bf16 as uint16,\n"
      "topk_idx [num_tokens, num_topk] int32, topk_weights [num_tokens, num_topk] float32), "
      "numpy.\n\n"
      "first_token: position in the stream, so that ranks can take their own part.\n"
      "routing: 'uniform', 'zipf' or 'one-expert'.\n\n"
      "Raises Error: invalid_argument.");
}

}  // namespace sluice::python
