// synthetic_families.h - the layouts that make-checkpoint knows, by name.
#pragma once

#include "sluice/lab/synthetic.h"

namespace sluice {

/// Layouts with tensors or a quantization_config of their own.
enum class Family {
  kW4afp8,
  kCompressedTensors,
  kKimi,
  kKimiMxfp4,
  kDeepseekFp4,
  kGptOss,
  kAngelslim,
  kModelopt,
  kFp8Block,
  kBf16
};

struct FormatDefinition {
  const char* name;
  Family family;
  bool allows_group_32, has_static_inputs;
};

/// Throws: kInvalidArgument listing the names.
[[nodiscard]] const FormatDefinition& definition(const SyntheticCheckpoint& spec);

}  // namespace sluice
