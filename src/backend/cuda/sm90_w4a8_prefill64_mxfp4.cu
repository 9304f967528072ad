// sm90_w4a8_prefill64_mxfp4.cu - prefill kernels of tiles up to 64 rows for near matrices of mxfp4,
// of all activations.
#include "backend/cuda/sm90_w4a8_experts.cuh"

namespace sluice::cuda {

template <XScale X>
using C = Config<KernelConfig::kPrefill64, WeightCode::kE2M1, ScaleType::kE8M0, 32, X,
                 Activations::kOthers, WeightFormat::kMxfp4>;

template void launch_kernel<C<XScale::kPerGroup>>(const Params&, int, cudaStream_t);
template void launch_kernel<C<XScale::kPerRow>>(const Params&, int, cudaStream_t);

}  // namespace sluice::cuda
