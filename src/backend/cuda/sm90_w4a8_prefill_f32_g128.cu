// sm90_w4a8_prefill_f32_g128.cu - the prefill kernels for f32 weight scales in groups of 128.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template void
launch_kernel<Config<KernelConfig::kPrefill, WeightCode::kOnesComplement, ScaleType::kF32, 128>>(
    const Params&, int, cudaStream_t);
template void
launch_kernel<Config<KernelConfig::kPrefill, WeightCode::kSignMagnitude, ScaleType::kF32, 128>>(
    const Params&, int, cudaStream_t);

}  // namespace sluice::cuda
