// report_example.h - a certificate as JSON, small and real.
#pragma once

#include "accuracy_fixture.h"
#include "report/accuracy_json.h"
#include "report/accuracy_layers.h"

namespace sluice::testing {

/// What `sluice accuracy --json` writes, for two suites.
inline nlohmann::ordered_json report_example() {
  const auto source = make_synthetic_source(accuracy_geometry(), 1);
  nlohmann::ordered_json json = {{"command", "accuracy"},
                                 {"version", "test"},
                                 {"source", "preset <test> & more"},
                                 {"original_weights", source->original_kind()},
                                 {"geometry",
                                  {{"num_experts", 6},
                                   {"num_topk", 3},
                                   {"hidden", 384},
                                   {"intermediate", 256},
                                   {"group_size", 128}}},
                                 {"tokens", 9},
                                 {"seed", 1},
                                 {"layer", 3},
                                 {"gate", "direct"},
                                 {"suites", nlohmann::ordered_json::array()}};
  std::vector<SuiteCertificate> suites;
  for (const char* name : {"gaussian", "token-spread"}) {
    suites.push_back(certify(*source, make_suite(name, accuracy_geometry(), 9, 1), {}));
    json["suites"].push_back(report::to_json(suites.back()));
  }
  IdentityProof proof;
  proof.direct = proof.direct_bf16 = proof.definition = 0xabcdef;
  json["identity"] = {report::to_json(proof)};
  json["passed"] = false;
  json["budget"] = report::to_json(judge_budget(suites, parse_recipe("direct"), 0.0));
  return json;
}

/// What `--layer all` writes, for three layers of which the second is the worst.
inline nlohmann::ordered_json layers_example() {
  std::vector<nlohmann::ordered_json> layers;
  for (const int layer : {3, 4, 9}) {
    layers.push_back(report_example());
    layers.back()["layer"] = layer;
    if (layer != 4) layers.back()["suites"][0]["recipes"][0]["added_percent"] = 0.5;
    if (layer != 4) layers.back()["suites"][1]["recipes"][0]["added_percent"] = 0.5;
    layers.back()["passed"] = layer != 4;
  }
  nlohmann::ordered_json json = {{"command", "accuracy"}, {"version", "test"}};
  json.update(report::join_layers(std::move(layers)));
  return json;
}

}  // namespace sluice::testing
