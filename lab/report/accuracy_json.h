// accuracy_json.h - a certificate as JSON; docs/accuracy.md has the schema.
#pragma once

#include <nlohmann/json.hpp>

#include "sluice/lab/accuracy.h"

namespace sluice::report {

[[nodiscard]] nlohmann::ordered_json to_json(const SuiteCertificate& certificate);
[[nodiscard]] nlohmann::ordered_json to_json(const IdentityProof& proof);
[[nodiscard]] nlohmann::ordered_json to_json(const BudgetVerdict& verdict);

}  // namespace sluice::report
