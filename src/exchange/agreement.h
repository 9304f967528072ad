// agreement.h - ranks compare what they are about to do, before they do it.
#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace sluice {

class Transport;

inline constexpr const char* kCall = "the call";

/// Named values on which all ranks must agree: {"hidden", "7168"}. Where ranks may be in different
/// calls, the first are their version and {kCall, what this rank calls}.
using Agreement = std::vector<std::pair<std::string, std::string>>;

/// Collective. `operation`: for messages.
/// Throws: kTransport naming the first field that differs, with the value of rank 0 and
/// of every rank that has another; kPeerTimeout if a rank does not take part.
void require_agreement(Transport& transport, const Agreement& fields,
                       std::chrono::milliseconds timeout,
                       const std::string& operation = "creation");

}  // namespace sluice
