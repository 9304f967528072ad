// fault_words.h - what a fault of the exchange's kernels is called, on one host and over several.
#pragma once

#include "exchange/cuda/exchange_kernels.h"
#include "sluice/exchange.h"

namespace sluice {

/// The operation in which `fault` was found.
[[nodiscard]] const char* operation_of(const cuda::DeviceFault& fault);

/// An earlier dispatch was refused, or had an index out of range.   Throws: kInvalidArgument.
[[noreturn]] void throw_refusal(const ExchangeConfig& config, const cuda::DeviceFault& refusal);

}  // namespace sluice
