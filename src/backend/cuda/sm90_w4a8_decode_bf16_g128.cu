// sm90_w4a8_decode_bf16_g128.cu - the decode kernels for bf16 weight scales in groups of 128.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template void
launch_kernel<Config<KernelConfig::kDecode, WeightCode::kOnesComplement, ScaleType::kBf16, 128>>(
    const Params&, int, cudaStream_t);
template void
launch_kernel<Config<KernelConfig::kDecode, WeightCode::kSignMagnitude, ScaleType::kBf16, 128>>(
    const Params&, int, cudaStream_t);

}  // namespace sluice::cuda
