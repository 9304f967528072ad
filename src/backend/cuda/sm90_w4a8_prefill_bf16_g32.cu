// sm90_w4a8_prefill_bf16_g32.cu - the prefill kernels for bf16 weight scales in groups of 32.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template void
launch_kernel<Config<KernelConfig::kPrefill, WeightCode::kOnesComplement, ScaleType::kBf16, 32>>(
    const Params&, int, cudaStream_t);
template void
launch_kernel<Config<KernelConfig::kPrefill, WeightCode::kSignMagnitude, ScaleType::kBf16, 32>>(
    const Params&, int, cudaStream_t);

}  // namespace sluice::cuda
