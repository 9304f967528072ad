// layer.cuh - a random expert layer on the device, for the checker and the benchmark.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/w4a8.h"
#include "bench/kernels/random_mxfp4.cuh"
#include "sluice/repack.h"

namespace sluice::cuda::bench {

/// Random int4 pairs; without -8 if `symmetric`.
__global__ void random_codes(std::uint8_t* out, std::size_t n, std::uint64_t seed, bool symmetric,
                             Data data) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint32_t v = hash(seed * 0x100000001ull + i) & 0xff;
    if (data == Data::kNormal) {
      v = 0;
      for (int j = 0; j < 2; ++j) {
        const float x = 2.7f * normal(hash(seed * 0x100000001ull + 2 * i + j));
        v |= (static_cast<int>(rintf(fminf(fmaxf(x, -8.0f), 7.0f))) & 0xf) << (4 * j);
      }
    }
    if (symmetric) {
      if ((v & 0xf) == 8) v ^= 1;
      if (v >> 4 == 8) v ^= 0x10;
    }
    out[i] = static_cast<std::uint8_t>(v);
  }
}

/// Scales lo * 2^(0..octaves), as bf16 or f32.
__global__ void random_scales(void* out, std::size_t n, std::uint64_t seed, bool bf16, float lo,
                              float octaves) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const float u = hash(seed * 0x200000001ull + i) * 0x1p-32f;
    const float s = lo * exp2f(u * octaves);
    if (bf16) {
      static_cast<std::uint16_t*>(out)[i] = static_cast<std::uint16_t>(__float_as_uint(s) >> 16);
    } else {
      static_cast<float*>(out)[i] = s;
    }
  }
}

/// e4m3 codes. kUniform: even rows uniform over all finite codes (heavy tails, subnormals, +-448),
/// odd rows normal with a standard deviation of 60. kNormal: 165, as quantization of normal values
/// gives.
__global__ void random_activations(std::uint8_t* out, std::size_t n, int k, std::uint64_t seed,
                                   Data data) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const std::uint32_t r = hash(seed * 0x300000001ull + i);
    if (data == Data::kUniform && i / k % 2 == 0) {
      std::uint32_t c = r & 0xff;
      if ((c & 0x7f) == 0x7f) c ^= 1;
      out[i] = static_cast<std::uint8_t>(c);
    } else {
      const float x = (data == Data::kUniform ? 60.0f : 165.0f) * normal(r);
      out[i] = static_cast<std::uint8_t>(ptx::e4m3x2_from_float(0.0f, x));
    }
  }
}

/// Weights of a layer, canonical (optional) and packed.
struct Weights {
  int num_experts, hidden, intermediate, group;
  ScaleType scale_type;
  WeightCode code;
  // Canonical, all experts: gate [E, I, H/2], up, down [E, H, I/2], and their scales (raw bytes).
  Buffer<std::uint8_t> codes[3], scales[3];
  Buffer<std::uint8_t> packed_gate_up, packed_down;

  WeightFormat format() const {
    return scale_type == ScaleType::kE8M0 ? WeightFormat::kMxfp4 : WeightFormat::kInt4;
  }
  PackedWeights gate_up() const {
    return {packed_gate_up.data, {2 * intermediate, hidden, group, scale_type, format()}, code};
  }
  PackedWeights down() const {
    return {packed_down.data, {hidden, intermediate, group, scale_type, format()}, code};
  }
};

struct WeightSpec {
  int num_experts, hidden, intermediate;
  int group = 128;
  ScaleType scale_type = ScaleType::kBf16;
  WeightCode code = WeightCode::kOnesComplement;
  std::uint64_t seed = 1;
  bool keep_canonical = true;
  Data data = Data::kUniform;
  Spread spread = Spread::kFew;  ///< Of mxfp4: kE2M1, groups of 32, kE8M0.
};

inline void random_matrix(const WeightSpec& spec, const Weights& w, int i) {
  const std::size_t num_scales = 2 * w.codes[i].size / spec.group;
  if (spec.code != WeightCode::kE2M1) {
    random_codes<<<1024, 256>>>(w.codes[i].data, w.codes[i].size, spec.seed * 8 + i,
                                spec.code == WeightCode::kSignMagnitude, spec.data);
    random_scales<<<1024, 256>>>(w.scales[i].data, num_scales, spec.seed * 8 + 4 + i,
                                 spec.scale_type == ScaleType::kBf16, 0x1p-8f, 3.0f);
    return;
  }
  random_e2m1<<<1024, 256>>>(w.codes[i].data, w.codes[i].size, spec.seed * 8 + i, spec.data);
  const int k = i < 2 ? spec.hidden : spec.intermediate,
            n = i < 2 ? spec.intermediate : spec.hidden;
  // Sums of all bytes' scales would leave float32 before the activation.
  const bool is_all = spec.spread == Spread::kAllBytes;
  random_e8m0<<<1024, 256>>>(w.scales[i].data, num_scales, k / 32, n, spec.seed * 8 + 4 + i,
                             is_all && i < 2 ? Spread::kMost : spec.spread);
  if (spec.spread == Spread::kZeros) {
    zero_far_groups<<<1024, 256>>>(w.scales[i].data, w.codes[i].data, num_scales);
  }
}

inline Weights make_weights(const WeightSpec& spec) {
  Weights w{.num_experts = spec.num_experts,
            .hidden = spec.hidden,
            .intermediate = spec.intermediate,
            .group = spec.group,
            .scale_type = spec.scale_type,
            .code = spec.code};
  const std::size_t experts = spec.num_experts;
  const std::size_t elements = static_cast<std::size_t>(spec.hidden) * spec.intermediate;
  const std::size_t sb = scale_bytes(spec.scale_type);
  const std::size_t one_scales = elements / spec.group;
  for (int i = 0; i < 3; ++i) {
    w.codes[i] = Buffer<std::uint8_t>(experts * elements / 2);
    w.scales[i] = Buffer<std::uint8_t>(experts * one_scales * sb);
    random_matrix(spec, w, i);
  }
  const std::size_t gu = packed_expert_bytes(w.gate_up().shape);
  const std::size_t dn = packed_expert_bytes(w.down().shape);
  w.packed_gate_up = Buffer<std::uint8_t>(experts * gu);
  w.packed_down = Buffer<std::uint8_t>(experts * dn);
  Buffer<RepackFindings> findings(1);
  const RepackFindings none;
  SLUICE_CUDA_CHECK(cudaMemcpy(findings.data, &none, sizeof(none), cudaMemcpyHostToDevice));
  const auto source = [&](int i, std::size_t e, int k) {
    return dense_source(reinterpret_cast<const std::byte*>(w.codes[i].data + e * elements / 2),
                        reinterpret_cast<const std::byte*>(w.scales[i].data + e * one_scales * sb),
                        k, spec.group);
  };
  std::vector<ExpertSource> sources;
  for (std::size_t e = 0; e < experts; ++e) {
    sources.push_back({.gate = source(0, e, spec.hidden),
                       .up = source(1, e, spec.hidden),
                       .down = source(2, e, spec.intermediate)});
  }
  launch_repack({.shape = w.gate_up().shape,
                 .code = spec.code,
                 .is_gate_up = true,
                 .experts = sources,
                 .packed = w.packed_gate_up.data,
                 .findings = findings.data},
                nullptr);
  launch_repack({.shape = w.down().shape,
                 .code = spec.code,
                 .experts = sources,
                 .packed = w.packed_down.data,
                 .findings = findings.data},
                nullptr);
  SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
  if (findings.download()[0].has_far != 0) w.code = WeightCode::kE2M1Far;
  if (!spec.keep_canonical) {
    for (int i = 0; i < 3; ++i) {
      w.codes[i] = Buffer<std::uint8_t>();
      w.scales[i] = Buffer<std::uint8_t>();
    }
  }
  return w;
}

}  // namespace sluice::cuda::bench
