// The exchange of one rank whose tokens and experts share one GPU: nothing crosses, rows are only
// sorted.
#include <cuda_runtime_api.h>

#include <vector>

#include "backend/cuda/check.h"
#include "backend/ops.h"
#include "core/fail.h"
#include "exchange/cuda/local_kernels.h"
#include "exchange/impl.h"
#include "sluice/quant.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

/// Device memory of one dispatch in flight.
struct Slot {
  std::unique_ptr<DeviceBuffer> rows, scale, row_begin, num_rows, slot_row;
  bool busy = false;
};

class CudaLocalExchange final : public Exchange::Impl {
 public:
  CudaLocalExchange(const ExchangeConfig& config_in, Backend& backend);
  ~CudaLocalExchange() override {
    if (fault_ != nullptr) (void)cudaFreeHost(fault_);
  }
  [[nodiscard]] std::unique_ptr<Dispatched::Route> dispatch(TensorView x, const Routing& routing,
                                                            Stream stream) override;
  void combine(Dispatched::Route& route, TensorView expert_y, MutableTensorView y,
               Stream stream) override;
  [[nodiscard]] ExchangeCounters counters() const override { return counters_; }

 private:
  struct LocalRoute final : Dispatched::Route {
    explicit LocalRoute(Slot& s) : slot(s) { slot.busy = true; }
    ~LocalRoute() override { slot.busy = false; }
    Slot& slot;
    Routing routing;
  };
  void throw_fault();

  std::vector<Slot> slots_;
  cuda::Fault* fault_ = nullptr;
  ExchangeCounters counters_;
};

CudaLocalExchange::CudaLocalExchange(const ExchangeConfig& config_in, Backend& backend) {
  config = config_in;
  check_argument(config.num_experts <= cuda::kMaxLocalExperts,
                 "{} experts on one CUDA rank; at most {}", config.num_experts,
                 int{cuda::kMaxLocalExperts});
  const std::int64_t slots_per_call = std::int64_t{config.max_tokens_per_rank} * config.num_topk;
  max_rows = config.mode == Mode::kLowLatency ? std::int64_t{config.num_experts} * config.max_m
                                              : slots_per_call;
  check_argument(max_rows < (std::int64_t{1} << 31), "{} rows; at most 2^31 - 1", max_rows);
  const auto rows = static_cast<std::size_t>(max_rows);
  const auto experts = static_cast<std::size_t>(config.num_experts);
  const auto hidden = static_cast<std::size_t>(config.hidden);
  slots_.resize(static_cast<std::size_t>(config.num_in_flight));
  for (Slot& slot : slots_) {
    slot.rows = backend.allocate(rows * hidden * (config.wire == WireFormat::kBf16 ? 2 : 1));
    slot.scale = backend.allocate(rows * hidden / kActivationGroup * sizeof(float));
    slot.row_begin = backend.allocate(experts * sizeof(std::int64_t));
    slot.num_rows = backend.allocate(experts * sizeof(std::int32_t));
    slot.slot_row =
        backend.allocate(static_cast<std::size_t>(slots_per_call) * sizeof(std::int32_t));
  }
  SLUICE_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&fault_), sizeof(cuda::Fault),
                                  cudaHostAllocMapped | cudaHostAllocPortable));
  *fault_ = {};
  counters_.dispatch_bytes.resize(1);
  counters_.combine_bytes.resize(1);
  counters_.dispatch_rows.resize(1);
  counters_.wait_ns.resize(1);
}

/// Throws what an earlier call found on the device; the exchange works on afterwards.
void CudaLocalExchange::throw_fault() {
  volatile cuda::Fault* seen = fault_;
  if (seen->kind == cuda::kNoFault) return;
  const cuda::Fault fault{seen->kind, seen->where, seen->count, seen->value};
  seen->kind = cuda::kNoFault;
  if (fault.kind == cuda::kBadIndex) {
    fail(ErrorCode::kInvalidArgument,
         "an earlier dispatch had topk_idx[{}, {}] = {}, not in [-1, {}): that slot was left empty",
         fault.where / config.num_topk, fault.where % config.num_topk, fault.value,
         config.num_experts);
  }
  fail(ErrorCode::kInvalidArgument,
       "an earlier dispatch gave expert {} {} rows, max_m is {}: its result is not valid",
       fault.where, fault.count, fault.value);
}

std::unique_ptr<Dispatched::Route> CudaLocalExchange::dispatch(TensorView x, const Routing& routing,
                                                               Stream stream) {
  throw_fault();
  Slot* slot = nullptr;
  for (Slot& s : slots_) {
    if (!s.busy && slot == nullptr) slot = &s;
  }
  check_argument(slot != nullptr,
                 "{} dispatches are in flight, num_in_flight is {}: combine or "
                 "destroy one first",
                 slots_.size(), config.num_in_flight);
  auto route = std::make_unique<LocalRoute>(*slot);
  route->routing = routing;
  const std::int64_t num_tokens = x.dim(0);
  auto* slot_row = reinterpret_cast<std::int32_t*>(slot->slot_row->data());
  const cuda::RouteParams params{
      .topk_idx = routing.topk_idx.data,
      .wide_idx = routing.topk_idx.dtype == DType::kInt64,
      .num_slots = static_cast<int>(num_tokens * config.num_topk),
      .num_experts = config.num_experts,
      .max_m = config.max_m,
      .row_begin = reinterpret_cast<std::int64_t*>(slot->row_begin->data()),
      .num_rows = reinterpret_cast<std::int32_t*>(slot->num_rows->data()),
      .slot_row = slot_row,
      .fault = fault_};
  cuda::launch_route(params, stream.handle);
  cuda::launch_scatter(
      {.x = x.as<std::uint16_t>(),
       .slot_row = slot_row,
       .num_topk = config.num_topk,
       .hidden = config.hidden,
       .static_inverse = config.wire == WireFormat::kE4m3Static ? 1.0f / config.static_scale : 0.0f,
       .rows = reinterpret_cast<std::uint8_t*>(slot->rows->data()),
       .row_scale = reinterpret_cast<float*>(slot->scale->data())},
      config.wire, num_tokens, stream.handle);

  ExpertBatch& batch = route->batch;
  const bool masked = config.mode == Mode::kLowLatency;
  const bool scaled = config.wire == WireFormat::kE4m3Group || config.wire == WireFormat::kE4m3Pow2;
  const std::int64_t groups = config.hidden / kActivationGroup;
  batch.layout = config.mode;
  batch.x = {slot->rows->data(),
             config.wire == WireFormat::kBf16 ? DType::kBFloat16 : DType::kFloat8E4M3,
             masked ? Shape{config.num_experts, config.max_m, config.hidden}
                    : Shape{max_rows, config.hidden},
             device};
  if (scaled) {
    batch.x_scale = {
        slot->scale->data(), DType::kFloat32,
        masked ? Shape{config.num_experts, config.max_m, groups} : Shape{max_rows, groups}, device};
  }
  batch.num_rows = {params.num_rows, DType::kInt32, Shape{config.num_experts}, device};
  batch.row_begin = {params.row_begin, DType::kInt64, Shape{config.num_experts}, device};
  batch.expected_m =
      static_cast<int>((params.num_slots + config.num_experts - 1) / config.num_experts);
  counters_.num_dispatches += 1;
  return route;
}

void CudaLocalExchange::combine(Dispatched::Route& base, TensorView expert_y, MutableTensorView y,
                                Stream stream) {
  auto& route = static_cast<LocalRoute&>(base);
  const cuda::CombineParams params{
      .expert_y = expert_y.as<std::uint16_t>(),
      .slot_row = reinterpret_cast<const std::int32_t*>(route.slot.slot_row->data()),
      .weights = route.routing.topk_weights.as<float>(),
      .num_topk = config.num_topk,
      .hidden = config.hidden,
      .factor = config.routed_scaling_factor,
      .y = y.as<std::uint16_t>()};
  cuda::launch_combine(params, y.dim(0), stream.handle);
}

}  // namespace

std::unique_ptr<Exchange::Impl> make_cuda_exchange(const ExchangeConfig& config,
                                                   Transport& transport, Backend& backend) {
  if (transport.num_ranks() != 1) {
    fail(ErrorCode::kUnsupported,
         "{} ranks in CUDA memory: this version exchanges within one rank; "
         "several ranks run on the CPU backend",
         transport.num_ranks());
  }
  return std::make_unique<CudaLocalExchange>(config, backend);
}

}  // namespace sluice
