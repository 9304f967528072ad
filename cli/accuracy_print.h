// accuracy_print.h - a certificate as tables for people.
#pragma once

#include <string>

#include "sluice/lab/accuracy.h"

namespace sluice::cli {

/// Errors of each recipe, each rounding alone, static scales, engines.
void print_suite(const SuiteCertificate& suite);
void print_identity(const IdentityProof& proof, const std::string& backend);
void print_budget(const BudgetVerdict& verdict);

}  // namespace sluice::cli
