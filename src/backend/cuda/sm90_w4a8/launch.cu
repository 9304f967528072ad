// launch.cu - host launchers: checks, tensor maps, parameters, choice of instantiation.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/cuda/sm90_w4a8/choose_kernel.cuh"
#include "backend/cuda/sm90_w4a8/config.cuh"
#include "backend/cuda/w4a8.h"
#include "sluice/error.h"

namespace sluice::cuda {
namespace {

void require(bool ok, const char* what, long long value, const char* limit) {
  if (ok) return;
  throw Error(ErrorCode::kInvalidArgument,
              std::string(what) + " " + std::to_string(value) + ": " + limit);
}

void require_pointer(const void* p, std::size_t alignment, const char* what) {
  require(p != nullptr, what, 0, "must not be null");
  require(reinterpret_cast<std::uintptr_t>(p) % alignment == 0, what,
          static_cast<long long>(reinterpret_cast<std::uintptr_t>(p) % alignment),
          "is not aligned");
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's encoder, looked up at run time so that nothing links against the driver.
EncodeTiled find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  SLUICE_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                     cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    throw Error(ErrorCode::kUnsupported, "the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<EncodeTiled>(entry);
}

/// What the maps of some rows say. Codes are an address, no more: a map does not know whose it is.
struct MapsKey {
  const std::uint8_t* codes = nullptr;
  std::int64_t rows = 0, width = 0, row_bytes = 0;
  bool operator==(const MapsKey&) const = default;
};
using Maps = std::array<CUtensorMap, kNumTokenBoxes>;

/// [rows, width] e4m3, rows row_bytes apart, in boxes of (128, tokens), 128 B swizzle.
CUtensorMap encode_map(const MapsKey& key, int tokens) {
  static const EncodeTiled encode = find_encoder();
  CUtensorMap map;
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(key.width),
                              static_cast<cuuint64_t>(key.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(key.row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kStepK), static_cast<cuuint32_t>(tokens)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult status = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<std::uint8_t*>(key.codes), dims, strides,
      box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw Error(ErrorCode::kCuda, "cuTensorMapEncodeTiled failed: " + std::to_string(status));
  }
  return map;
}

/// Maps for boxes of 8 << i tokens.
///
/// The layers of a model share their rows, so most calls want maps that were encoded before. The
/// last ones of this thread are remembered. A map is a function of its key, so none is ever stale.
const Maps& maps_of(const Fp8RowsView& x, std::int64_t rows) {
  struct Remembered {
    MapsKey key;
    Maps maps;
  };
  constexpr int kIndexBits = 6;  // x and h of 32 batch sizes; 42 KB.
  static thread_local std::vector<Remembered> last(1u << kIndexBits);
  const MapsKey key{x.codes, rows, x.width, x.row_bytes()};
  // Fibonacci hashing: the high bits of a product by 2^64 / golden ratio.
  const std::uint64_t mixed = (reinterpret_cast<std::uintptr_t>(key.codes) / 16 +
                               static_cast<std::uint64_t>(rows) * 0x10001) *
                              0x9e3779b97f4a7c15u;
  Remembered& slot = last[mixed >> (64 - kIndexBits)];
  if (slot.key != key) {
    slot.key = {};
    for (int i = 0; i < kNumTokenBoxes; ++i) slot.maps[i] = encode_map(key, 8 << i);
    slot.key = key;
  }
  return slot.maps;
}

/// 1 / beta, or 0 for a kind without one.
float inverse_of(float beta, const ActivationFn& fn) {
  if (beta == 0) return 0;
  if (beta < 0x1p-126f || beta > 0x1p126f) {  // The kernel multiplies by it.
    throw Error(ErrorCode::kUnsupported, "activation " + to_string(fn) +
                                             ": the CUDA kernel needs beta and linear_beta from "
                                             "2^-126 to 2^126");
  }
  return 1.0f / beta;
}

void check_shape(const WeightShape& shape) {
  check_weight_format(shape.format);
  require(shape.n > 0 && shape.n % 128 == 0, "n", shape.n, "must be a positive multiple of 128");
  require(shape.k > 0 && shape.k % 128 == 0, "k", shape.k, "must be a positive multiple of 128");
  require(allows_group_size(shape.format, shape.group), "group", shape.group,
          "must be 128 or 32, of mxfp4 32");
  require((shape.scale_type == ScaleType::kE8M0) == (shape.format == WeightFormat::kMxfp4),
          "scale type", static_cast<int>(shape.scale_type), "must be e8m0 for mxfp4 alone");
}

bool is_mxfp4(WeightCode code) {
  return code == WeightCode::kE2M1 || code == WeightCode::kE2M1Far;
}

void check_scale(float s, const char* what) {
  if (!(s > 0) || s > 3.4e38f) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(what) + " " + std::to_string(s) + ": must be finite and positive");
  }
}

Params make_params(const RowRanges& rows, void* sync) {
  require(rows.num_experts >= 1 && rows.num_experts <= kMaxExperts, "num_experts", rows.num_experts,
          "must be 1..512");
  require(rows.max_rows >= 0 && rows.max_rows < (1LL << 31), "max_rows", rows.max_rows,
          "must be below 2^31");
  require_pointer(rows.count, 4, "num_rows");
  require_pointer(sync, 4, "sync");
  if (rows.begin == nullptr) {
    require(rows.num_experts * rows.max_rows_per_expert <= rows.max_rows, "max_rows_per_expert",
            rows.max_rows_per_expert, "num_experts * max_rows_per_expert exceeds max_rows");
  }
  Params p{};
  p.num_experts = rows.num_experts;
  p.num_rows = rows.count;
  p.row_offset = rows.begin;
  p.max_m = static_cast<int>(rows.max_rows_per_expert);
  p.sync = static_cast<int*>(sync);
  return p;
}

/// Appends one grouped GEMM that reads `x`.
Phase& add_phase(Params& p, const PackedWeights& weights, const RowRanges& rows,
                 const Fp8RowsView& x) {
  const WeightShape& shape = weights.shape;
  check_shape(shape);
  require(is_mxfp4(weights.code) == (shape.format == WeightFormat::kMxfp4), "weight code",
          static_cast<int>(weights.code), "is another format's");
  require(x.width == shape.k, "activation width", x.width, "must equal k");
  require_pointer(weights.data, 128, "packed weights");
  require_pointer(x.codes, 16, "activation codes");
  require(x.row_bytes() >= x.width && x.row_bytes() % 16 == 0, "activation stride", x.stride,
          "must be 0 or a multiple of 16, at least the width");
  if (x.scale == nullptr) check_scale(x.static_scale, "static activation scale");
  std::ranges::copy(maps_of(x, rows.max_rows), p.x_map[p.num_phases]);
  Phase& phase = p.phase[p.num_phases++];
  phase.weights = static_cast<const std::uint8_t*>(weights.data);
  phase.expert_bytes = static_cast<long long>(packed_expert_bytes(shape));
  phase.num_steps = shape.k / kStepK;
  phase.num_row_tiles = (shape.n + kTileRows - 1) / kTileRows;
  phase.tail_slabs = shape.n % kTileRows == 0 ? kSlabsPerTile : kSlabsPerTile / 2;
  phase.n = shape.n;
  phase.x_scale = x.scale;
  phase.x_static = x.static_scale;
  return phase;
}

void add_bf16(Params& p, const PackedWeights& weights, const RowRanges& rows, const Fp8RowsView& x,
              std::uint16_t* y, const HomeRows& home) {
  if (home.origin == nullptr) {
    require_pointer(y, 16, "y");
  } else {
    require_pointer(home.origin, 8, "home.origin");
    require_pointer(home.rows, 8, "home.rows");
  }
  Phase& phase = add_phase(p, weights, rows, x);
  phase.epilogue = Epilogue::kBf16;
  phase.y = y;
  phase.home = home;
}

void add_hidden(Params& p, const PackedWeights& weights, const RowRanges& rows,
                const Fp8RowsView& x, const Fp8Rows& h, const ActivationFn& activation) {
  require(weights.shape.n % kTileRows == 0, "gate_up n", weights.shape.n,
          "must be 2 * intermediate, a multiple of 256");
  require(2 * h.width == weights.shape.n, "h width", h.width, "must be half of gate_up n");
  require_pointer(h.codes, 16, "h codes");
  require(h.row_bytes() == h.width, "h stride", h.stride, "rows of h are dense");
  require(!h.scale_per_row, "h scales per row", 1, "h has scales per 128 or a static one");
  if (h.scale == nullptr) check_scale(h.static_scale, "static h scale");
  Phase& phase = add_phase(p, weights, rows, x);
  phase.epilogue = Epilogue::kHidden;
  phase.activation = activation_params(activation);
  phase.h = h.codes;
  phase.h_scale = h.scale;
  phase.h_inv_static = h.scale == nullptr ? 1.0f / h.static_scale : 0.0f;
}

/// Where the scales of x meet the sums of a GEMM by itself.
XScale x_scale_of(const Fp8RowsView& x) {
  if (x.scale == nullptr) return XScale::kPerRow;
  return x.scale_per_row ? XScale::kRowThenGroup : XScale::kPerGroup;
}

/// The same for x and h in one kernel; empty where no kernel has both.
std::optional<XScale> x_scale_of(const Fp8RowsView& x, const Fp8RowsView& h, KernelConfig config) {
  const XScale first = x_scale_of(x), second = x_scale_of(h);
  if (first == second && first != XScale::kRowThenGroup) return first;
  const bool is_decode = config == KernelConfig::kDecode;
  if (second == XScale::kPerGroup && is_decode) return XScale::kRowThenGroup;
  return std::nullopt;
}

void launch(const Params& p, const PackedWeights& w, const RowRanges& rows, XScale x,
            const ConfigChoice& config, StreamHandle handle) {
  require(config.num_ctas > 0, "config.num_ctas", config.num_ctas, "take it from choose_config()");
  if (rows.max_rows == 0) return;
  const auto stream = static_cast<cudaStream_t>(handle);
  if (config.config == KernelConfig::kDecode) {
    launch_code<KernelConfig::kDecode>(p, w, x, config.num_ctas, stream);
  } else if (config.config == KernelConfig::kPrefill64) {
    launch_code<KernelConfig::kPrefill64>(p, w, x, config.num_ctas, stream);
  } else {
    launch_code<KernelConfig::kPrefill>(p, w, x, config.num_ctas, stream);
  }
}

}  // namespace

ActivationParams activation_params(const ActivationFn& fn) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
    case ActivationKind::kSwigluLimit:
    case ActivationKind::kSwigluOai:
    case ActivationKind::kSitu:
      check_activation(fn);
      return {.kind = fn.kind,
              .limit = fn.kind == ActivationKind::kSwiglu ? kInfinity : fn.limit,
              .alpha = fn.kind == ActivationKind::kSwigluOai ? fn.alpha : 1.0f,
              .offset = fn.kind == ActivationKind::kSwigluOai ? 1.0f : -0.0f,
              .beta = fn.beta,
              .inv_beta = inverse_of(fn.beta, fn),
              .linear_beta = fn.linear_beta,
              .inv_linear_beta = inverse_of(fn.linear_beta, fn)};
  }
  refuse("activation", static_cast<int>(fn.kind));
}

void check_kernel_activation(const ActivationFn& fn) {
  (void)activation_params(fn);
}

void launch_grouped_gemm(const GroupedGemm& args, StreamHandle stream) {
  if (args.rows.max_rows == 0) return;
  Params p = make_params(args.rows, args.sync);
  add_bf16(p, args.weights, args.rows, args.x, args.y, args.home);
  launch(p, args.weights, args.rows, x_scale_of(args.x), args.config, stream);
}

void launch_gate_up(const GateUpGemm& args, StreamHandle stream) {
  if (args.rows.max_rows == 0) return;
  Params p = make_params(args.rows, args.sync);
  add_hidden(p, args.weights, args.rows, args.x, args.h, args.activation);
  launch(p, args.weights, args.rows, x_scale_of(args.x), args.config, stream);
}

void launch_experts(const ExpertGemms& args, StreamHandle stream) {
  if (args.rows.max_rows == 0) return;
  const WeightShape& up = args.gate_up.shape;
  const WeightShape& down = args.down.shape;
  require(down.n == up.k, "down n", down.n, "must equal gate_up k (hidden)");
  require(up.n == 2 * down.k, "gate_up n", up.n, "must equal 2 * down k (intermediate)");
  require(args.down.code == args.gate_up.code && down.group == up.group &&
              down.scale_type == up.scale_type,
          "down group", down.group, "gate_up and down must share code, group and scale type");
  const std::optional<XScale> x = x_scale_of(args.x, args.h, args.config.config);
  // Far and near matrices are different kernels', and one expert may have both.
  if (!x || args.gate_up.code == WeightCode::kE2M1Far) {
    launch_gate_up({.weights = args.gate_up,
                    .rows = args.rows,
                    .x = args.x,
                    .h = args.h,
                    .sync = args.sync,
                    .config = args.config,
                    .activation = args.activation},
                   stream);
    launch_grouped_gemm({.weights = args.down,
                         .rows = args.rows,
                         .x = args.h,
                         .y = args.y,
                         .home = args.home,
                         .sync = args.sync,
                         .config = args.config},
                        stream);
    return;
  }
  Params p = make_params(args.rows, args.sync);
  add_hidden(p, args.gate_up, args.rows, args.x, args.h, args.activation);
  add_bf16(p, args.down, args.rows, args.h, args.y, args.home);
  launch(p, args.gate_up, args.rows, *x, args.config, stream);
}

}  // namespace sluice::cuda
