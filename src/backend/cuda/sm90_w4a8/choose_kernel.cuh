// choose_kernel.cuh - from a launch's weights, scales and activations to the instantiation that
// computes it: one of those that CMakeLists.txt of this folder lists.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "backend/cuda/sm90_w4a8/config.cuh"
#include "sluice/error.h"

namespace sluice::cuda {

/// A value without an instantiation: another one is another argument of Config, chosen below.
[[noreturn]] inline void refuse(const char* what, int value) {
  throw Error(ErrorCode::kUnsupported,
              std::string(what) + " " + std::to_string(value) + " has no CUDA kernel");
}

/// Whether the experts are a slice for tensor parallelism: tiles of y are over after a few steps of
/// math. There are kernels for up to 64 rows of MXFP4, and of INT4 with bf16 scales and plain
/// SwiGLU.
inline bool has_short_k(const Params& p) {
  constexpr int kFewSteps = 5;
  return p.num_phases == 2 && p.phase[1].num_steps < kFewSteps && p.phase[1].home.origin == nullptr;
}

/// The kernel of short K, where there is one and it is due.
template <KernelConfig Size, WeightCode Code, ScaleType Scale, int Group, XScale X,
          Activations Functions, WeightFormat Format = WeightFormat::kInt4>
void launch_length(const Params& p, int num_ctas, cudaStream_t stream) {
  if constexpr (Size != KernelConfig::kPrefill && X != XScale::kRowThenGroup &&
                Code != WeightCode::kE2M1Far && Scale != ScaleType::kF32 &&
                (Functions == Activations::kSwiglu || Format == WeightFormat::kMxfp4)) {
    if (has_short_k(p)) {
      return launch_kernel<Config<Size, Code, Scale, Group, X, Functions, Format, true>>(
          p, num_ctas, stream);
    }
  }
  launch_kernel<Config<Size, Code, Scale, Group, X, Functions, Format>>(p, num_ctas, stream);
}

/// Plain SwiGLU is one with a limit that never acts.
template <KernelConfig Size, WeightCode Code, XScale X>
void launch_mxfp4_length(const Params& p, int num_ctas, cudaStream_t stream) {
  launch_length<Size, Code, ScaleType::kE8M0, 32, X, Activations::kOthers, WeightFormat::kMxfp4>(
      p, num_ctas, stream);
}

template <KernelConfig Size, WeightCode Code>
void launch_mxfp4(const Params& p, XScale x, int num_ctas, cudaStream_t stream) {
  switch (x) {
    case XScale::kPerGroup:
      return launch_mxfp4_length<Size, Code, XScale::kPerGroup>(p, num_ctas, stream);
    case XScale::kPerRow:
      return launch_mxfp4_length<Size, Code, XScale::kPerRow>(p, num_ctas, stream);
    case XScale::kRowThenGroup:
      return launch_mxfp4_length<kUsual<Size>, Code, XScale::kRowThenGroup>(p, num_ctas, stream);
  }
  refuse("activation scales", static_cast<int>(x));
}

template <KernelConfig Size, WeightCode Code, ScaleType Scale, int Group, XScale X>
void launch_activations(const Params& p, int num_ctas, cudaStream_t stream) {
  if (p.phase[0].activation.kind == ActivationKind::kSwiglu) {
    launch_length<Size, Code, Scale, Group, X, Activations::kSwiglu>(p, num_ctas, stream);
  } else {
    launch_length<Size, Code, Scale, Group, X, Activations::kOthers>(p, num_ctas, stream);
  }
}

template <KernelConfig Size, WeightCode Code, ScaleType Scale, int Group>
void launch_x_scale(const Params& p, XScale x, int num_ctas, cudaStream_t stream) {
  switch (x) {
    case XScale::kPerGroup:
      return launch_activations<Size, Code, Scale, Group, XScale::kPerGroup>(p, num_ctas, stream);
    case XScale::kPerRow:
      return launch_activations<Size, Code, Scale, Group, XScale::kPerRow>(p, num_ctas, stream);
    case XScale::kRowThenGroup:
      return launch_activations<kUsual<Size>, Code, Scale, Group, XScale::kRowThenGroup>(
          p, num_ctas, stream);
  }
  refuse("activation scales", static_cast<int>(x));
}

template <KernelConfig Size, WeightCode Code, ScaleType Scale>
void launch_group(const Params& p, int group, XScale x, int num_ctas, cudaStream_t stream) {
  if (group == 128) {
    launch_x_scale<Size, Code, Scale, 128>(p, x, num_ctas, stream);
  } else {
    launch_x_scale<Size, Code, Scale, 32>(p, x, num_ctas, stream);
  }
}

template <KernelConfig Size, WeightCode Code>
void launch_scale(const Params& p, const WeightShape& shape, XScale x, int num_ctas,
                  cudaStream_t stream) {
  if (shape.scale_type == ScaleType::kBf16) {
    launch_group<Size, Code, ScaleType::kBf16>(p, shape.group, x, num_ctas, stream);
  } else {
    launch_group<Size, Code, ScaleType::kF32>(p, shape.group, x, num_ctas, stream);
  }
}

template <KernelConfig Size>
void launch_code(const Params& p, const PackedWeights& w, XScale x, int num_ctas,
                 cudaStream_t stream) {
  switch (w.code) {
    case WeightCode::kOnesComplement:
      return launch_scale<Size, WeightCode::kOnesComplement>(p, w.shape, x, num_ctas, stream);
    case WeightCode::kSignMagnitude:
      return launch_scale<Size, WeightCode::kSignMagnitude>(p, w.shape, x, num_ctas, stream);
    case WeightCode::kE2M1:
      return launch_mxfp4<Size, WeightCode::kE2M1>(p, x, num_ctas, stream);
    case WeightCode::kE2M1Far: {  // Of each expert one of the two kernels does nothing.
      Params chosen = p;
      chosen.chooses = true;
      launch_mxfp4<Size, WeightCode::kE2M1>(chosen, x, num_ctas, stream);
      return launch_mxfp4<KernelConfig::kDecode, WeightCode::kE2M1Far>(chosen, x, num_ctas, stream);
    }
  }
  refuse("weight code", static_cast<int>(w.code));
}

}  // namespace sluice::cuda
