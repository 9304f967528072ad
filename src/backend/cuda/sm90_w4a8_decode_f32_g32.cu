// sm90_w4a8_decode_f32_g32.cu - the decode kernels for f32 weight scales in groups of 32.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template void
launch_kernel<Config<KernelConfig::kDecode, WeightCode::kOnesComplement, ScaleType::kF32, 32>>(
    const Params&, int, cudaStream_t);
template void
launch_kernel<Config<KernelConfig::kDecode, WeightCode::kSignMagnitude, ScaleType::kF32, 32>>(
    const Params&, int, cudaStream_t);

}  // namespace sluice::cuda
