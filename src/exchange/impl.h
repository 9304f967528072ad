// impl.h - what an Exchange is made of: one implementation per memory kind.
//
// exchange.cc checks arguments, makes the ranks agree and picks the implementation; everything
// below may assume valid input.
#pragma once

#include <memory>

#include "sluice/exchange.h"

namespace sluice {

/// The way home for the rows of one dispatch. Its destructor returns the buffers to the exchange.
struct Dispatched::Route {
  virtual ~Route() = default;
  ExpertBatch batch;
  // Set by Exchange:
  std::int64_t num_tokens = 0;
  const void* owner = nullptr;  ///< The Exchange::Impl that made it.
};

struct Exchange::Impl {
  virtual ~Impl() = default;
  [[nodiscard]] virtual std::unique_ptr<Dispatched::Route> dispatch(TensorView x,
                                                                    const Routing& routing,
                                                                    Stream stream) = 0;
  virtual void combine(Dispatched::Route& route, TensorView expert_y, MutableTensorView y,
                       Stream stream) = 0;
  [[nodiscard]] virtual ExchangeCounters counters() const = 0;

  ExchangeConfig config;  ///< Checked; max_m resolved.
  int rank = 0;
  int num_ranks = 0;
  Device device;
  std::int64_t max_rows = 0;  ///< Rows of batch().x; set by the implementation.
};

[[nodiscard]] std::unique_ptr<Exchange::Impl> make_host_exchange(const ExchangeConfig& config,
                                                                 Transport& transport,
                                                                 Backend& backend);
#ifdef SLUICE_HAS_CUDA
[[nodiscard]] std::unique_ptr<Exchange::Impl> make_cuda_exchange(const ExchangeConfig& config,
                                                                 Transport& transport,
                                                                 Backend& backend);
#endif

}  // namespace sluice
