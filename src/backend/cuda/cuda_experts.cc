#include "backend/cuda/cuda_experts.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "backend/check_experts.h"
#include "backend/cuda/check.h"
#include "core/fail.h"

namespace sluice {
namespace {

cuda::WeightShape weight_shape(const RepackFormat& format, int n, int k) {
  return {.n = n,
          .k = k,
          .group = format.geometry.group_size,
          .scale_type = cuda::scale_type(format.scale_dtype),
          .format = format.geometry.weight_format};
}

void copy_within(void* to, const void* from, std::size_t bytes, cuda::StreamHandle stream) {
  SLUICE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                                    static_cast<cudaStream_t>(stream)));
}

}  // namespace

CudaBuffer::CudaBuffer(int device, std::size_t bytes) : device_(device), bytes_(bytes) {
  if (bytes == 0) return;
  const cudaError_t status = cudaMalloc(&data_, bytes);
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  std::size_t free_bytes = 0, total_bytes = 0;
  (void)cudaMemGetInfo(&free_bytes, &total_bytes);
  fail(status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kCuda,
       "cuda:{}: {} bytes requested, {} of {} free: {}", device, bytes, free_bytes, total_bytes,
       cudaGetErrorString(status));
}

CudaBuffer::~CudaBuffer() {
  if (data_ != nullptr && cudaSetDevice(device_) == cudaSuccess) (void)cudaFree(data_);
}

RepackFormat format_of(const ExpertWeights& weights) {
  check_argument(!weights.experts.empty(), "no experts to prepare");
  check_experts(weights);
  const Expert& first = weights.experts.front();
  for (const Expert& expert : weights.experts) {
    for (const QuantMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
      if (m->scales.dtype == first.gate.scales.dtype && m->group_size == first.gate.group_size &&
          m->format == first.gate.format) {
        continue;
      }
      fail(ErrorCode::kUnsupported,
           "experts of one layer with {} scales per {} weights and {} scales per {}: the CUDA "
           "backend wants one kind",
           to_string(first.gate.scales.dtype), first.gate.group_size, to_string(m->scales.dtype),
           m->group_size);
    }
  }
  RepackFormat format{.geometry = weights.geometry,
                      .num_experts = static_cast<int>(weights.experts.size()),
                      .scale_dtype = first.gate.scales.dtype,
                      .first_expert = weights.first_expert};
  format.geometry.group_size = first.gate.group_size;
  format.geometry.weight_format = first.gate.format;
  return format;
}

CudaExperts::CudaExperts(const RepackFormat& f, const MutableTensorView& room, int device_index)
    : format(f), device(device_index) {
  // What no kernel computes first: it may be of a kind that check_format() does not know.
  cuda::check_weight_format(format.geometry.weight_format);
  cuda::check_kernel_activation(format.geometry.activation);
  check_format(format);
  const ModelGeometry& g = format.geometry;
  if (g.weight_format == WeightFormat::kMxfp4) code = cuda::WeightCode::kE2M1;
  gate_up_shape = weight_shape(format, 2 * g.intermediate, g.hidden);
  down_shape = weight_shape(format, g.hidden, g.intermediate);
  MutableTensorView view = room;
  if (view.empty()) {
    const std::size_t bytes = packed_bytes(format, Device::Kind::kCuda);
    memory = std::make_unique<CudaBuffer>(device, bytes);
    view.data = memory->data(), view.dtype = DType::kUInt8;
    view.shape = {static_cast<std::int64_t>(bytes)};
    view.device = {Device::Kind::kCuda, device};
  }
  packed = split_memory(format, view, {Device::Kind::kCuda, device});
  // One piece of memory and one copy: cudaMalloc and cudaFree take as long as four experts.
  const std::size_t sync_bytes = (cuda::sync_bytes(format.num_experts) + 15) / 16 * 16;
  const cuda::RepackFindings none;
  std::vector<std::byte> begin(sync_bytes + sizeof(none));
  std::memcpy(begin.data() + sync_bytes, &none, sizeof(none));
  sync = std::make_unique<CudaBuffer>(device, begin.size());
  findings = reinterpret_cast<cuda::RepackFindings*>(sync->data() + sync_bytes);
  SLUICE_CUDA_CHECK(cudaMemcpy(sync->data(), begin.data(), begin.size(), cudaMemcpyHostToDevice));
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(nullptr));  // Other streams do not wait for it.
}

void CudaExperts::repack(int first, std::span<const ExpertSource> sources,
                         cuda::StreamHandle stream) {
  check_sources(format, packed, first, sources);
  const bool are_apart = !overlaps_itself(format, packed, first, sources);
  const bool in_place = !are_apart && overlaps_codes_alone(format, packed, first, sources) &&
                        cuda::fits_in_place(gate_up_shape) && cuda::fits_in_place(down_shape);
  const bool is_layer = first == 0 && std::ssize(sources) == format.num_experts;
  std::size_t count = 0;
  for (std::size_t i = 0; i < sources.size(); i += count) {
    const bool tells_code = is_layer && i == 0 && code == cuda::WeightCode::kSignMagnitude;
    count = (are_apart || in_place) && !tells_code ? sources.size() - i : 1;
    const int index = first + static_cast<int>(i);
    const std::span<const ExpertSource> some = sources.subspan(i, count);
    if (!are_apart && !in_place && overlaps_itself(format, packed, index, some)) {
      repack_aside(index, some, stream);
    } else {
      repack_half(index, true, some, part_of(index, true), stream, in_place);
      repack_half(index, false, some, part_of(index, false), stream, in_place);
    }
    if (tells_code) choose_code(stream);
  }
}

void CudaExperts::choose_code(cuda::StreamHandle stream) {
  if (found_so_far(stream).has_minus8 == 0) return;
  code = cuda::WeightCode::kOnesComplement;
  cuda::launch_recode(packed.gate_up, gate_up_shape, 1, stream);
  cuda::launch_recode(packed.down, down_shape, 1, stream);
}

std::byte* CudaExperts::part_of(int index, bool is_gate_up) const {
  return part_bytes(packed, index)[is_gate_up ? 0 : 1].data();
}

void CudaExperts::repack_half(int index, bool is_gate_up, std::span<const ExpertSource> sources,
                              std::byte* out, cuda::StreamHandle stream, bool in_place) const {
  const cuda::Repack args{.shape = is_gate_up ? gate_up_shape : down_shape,
                          .code = code,
                          .codes = format.codes,
                          .is_gate_up = is_gate_up,
                          .experts = sources,
                          .packed = out,
                          .expert = index,
                          .findings = findings};
  in_place ? cuda::launch_repack_in_place(args, stream) : cuda::launch_repack(args, stream);
}

void CudaExperts::repack_aside(int index, std::span<const ExpertSource> one,
                               cuda::StreamHandle stream) {
  const std::size_t gate_up_bytes = packed.sizes.gate_up_bytes;
  const std::size_t down_bytes = packed.sizes.down_bytes;
  // One half after the other needs less memory, unless the first would overwrite the second.
  const bool in_turns = leaves_down(format, packed, index, one.front());
  const std::size_t bytes =
      in_turns ? std::max(gate_up_bytes, down_bytes) : gate_up_bytes + down_bytes;
  if (aside == nullptr || aside->bytes() < bytes) {
    aside.reset();
    aside = std::make_unique<CudaBuffer>(device, bytes);
  }
  std::byte* const down_aside = aside->data() + (in_turns ? 0 : gate_up_bytes);
  const auto move_gate_up = [&] {
    copy_within(part_of(index, true), aside->data(), gate_up_bytes, stream);
  };
  repack_half(index, true, one, aside->data(), stream);
  if (in_turns) move_gate_up();
  repack_half(index, false, one, down_aside, stream);
  if (!in_turns) move_gate_up();
  copy_within(part_of(index, false), down_aside, down_bytes, stream);
}

void CudaExperts::repack_gate_up(int index, const MatrixSource& gate, const MatrixSource& up,
                                 cuda::StreamHandle stream) const {
  const ExpertSource one{.gate = gate, .up = up, .down = {}};
  repack_half(index, true, {&one, 1}, part_of(index, true), stream);
}

void CudaExperts::repack_down(int index, const MatrixSource& down,
                              cuda::StreamHandle stream) const {
  const ExpertSource one{.gate = {}, .up = {}, .down = down};
  repack_half(index, false, {&one, 1}, part_of(index, false), stream);
}

void CudaExperts::copy_to_host(std::byte* host) const {
  const auto count = static_cast<std::size_t>(format.num_experts);
  const std::size_t gate_up_bytes = count * packed.sizes.gate_up_bytes;
  SLUICE_CUDA_CHECK(cudaMemcpy(host, packed.gate_up, gate_up_bytes, cudaMemcpyDeviceToHost));
  SLUICE_CUDA_CHECK(cudaMemcpy(host + gate_up_bytes, packed.down, count * packed.sizes.down_bytes,
                               cudaMemcpyDeviceToHost));
}

void CudaExperts::take_any_expert(cuda::StreamHandle stream) {
  if (takes_any_expert()) return;
  if (code == cuda::WeightCode::kE2M1) {
    code = cuda::WeightCode::kE2M1Far;
    return;
  }
  code = cuda::WeightCode::kOnesComplement;
  cuda::launch_recode(packed.gate_up, gate_up_shape, format.num_experts, stream);
  cuda::launch_recode(packed.down, down_shape, format.num_experts, stream);
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

cuda::RepackFindings CudaExperts::found_so_far(cuda::StreamHandle stream) const {
  const auto queue = static_cast<cudaStream_t>(stream);
  cuda::RepackFindings found;
  SLUICE_CUDA_CHECK(
      cudaMemcpyAsync(&found, findings, sizeof(found), cudaMemcpyDeviceToHost, queue));
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(queue));
  return found;
}

void CudaExperts::finish(cuda::StreamHandle stream) {
  const cuda::RepackFindings found = found_so_far(stream);
  throw_scale_fault(found.scale_fault, format);
  if (found.has_minus8 != 0 || found.has_far != 0) take_any_expert(stream);
  aside.reset();
}

}  // namespace sluice
