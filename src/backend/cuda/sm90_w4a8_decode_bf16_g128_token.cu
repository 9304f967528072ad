// sm90_w4a8_decode_bf16_g128_token.cu - the decode kernels for one scale per row of x, and
// bf16 weight scales in groups of 128: of plain SwiGLU, and of the other activations.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template <WeightCode Code, Activations Functions>
using C =
    Config<KernelConfig::kDecode, Code, ScaleType::kBf16, 128, XScale::kRowThenGroup, Functions>;

template void launch_kernel<C<WeightCode::kOnesComplement, Activations::kSwiglu>>(const Params&,
                                                                                  int,
                                                                                  cudaStream_t);
template void launch_kernel<C<WeightCode::kOnesComplement, Activations::kOthers>>(const Params&,
                                                                                  int,
                                                                                  cudaStream_t);
template void launch_kernel<C<WeightCode::kSignMagnitude, Activations::kSwiglu>>(const Params&, int,
                                                                                 cudaStream_t);
template void launch_kernel<C<WeightCode::kSignMagnitude, Activations::kOthers>>(const Params&, int,
                                                                                 cudaStream_t);

}  // namespace sluice::cuda
