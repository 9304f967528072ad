// sm90_w4a8_decode_mxfp4.cu - the decode kernels for near matrices of mxfp4, of all activations.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template <XScale X>
using C = Config<KernelConfig::kDecode, WeightCode::kE2M1, ScaleType::kE8M0, 32, X,
                 Activations::kOthers, WeightFormat::kMxfp4>;

template void launch_kernel<C<XScale::kPerGroup>>(const Params&, int, cudaStream_t);
template void launch_kernel<C<XScale::kPerRow>>(const Params&, int, cudaStream_t);
template void launch_kernel<C<XScale::kRowThenGroup>>(const Params&, int, cudaStream_t);

}  // namespace sluice::cuda
