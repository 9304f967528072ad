// sm90_w4a8_prefill64_f32_g32.cu - prefill kernels of tiles up to 64 rows: f32 weight scales in
// groups of 32.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template <WeightCode Code, XScale X>
using C = Config<KernelConfig::kPrefill64, Code, ScaleType::kF32, 32, X>;

template void launch_kernel<C<WeightCode::kOnesComplement, XScale::kPerGroup>>(const Params&, int,
                                                                               cudaStream_t);
template void launch_kernel<C<WeightCode::kSignMagnitude, XScale::kPerGroup>>(const Params&, int,
                                                                              cudaStream_t);
template void launch_kernel<C<WeightCode::kOnesComplement, XScale::kPerRow>>(const Params&, int,
                                                                             cudaStream_t);
template void launch_kernel<C<WeightCode::kSignMagnitude, XScale::kPerRow>>(const Params&, int,
                                                                            cudaStream_t);

}  // namespace sluice::cuda
