// rail_device.h - what the exchange over hosts asks of its device: memory, and its kernels.
//
// One implementation is CUDA's (rail_kernels.cu). Tests have one that takes the same steps
// (rail_route.cuh, rail_place.cuh, rail_spread.cuh, rail_combine.cuh) on the ranks' threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "exchange/cuda/rail_params.h"
#include "sluice/exchange.h"
#include "sluice/recipe.h"
#include "sluice/stream.h"
#include "sluice/transport.h"

namespace sluice {

class RailDevice {
 public:
  virtual ~RailDevice() = default;

  /// Before the calls below, on the thread that makes them.
  virtual void use() = 0;
  /// Host memory, zero, that kernels address, too.
  [[nodiscard]] virtual std::shared_ptr<std::byte> map_host(std::size_t bytes) = 0;
  /// Lets this device's kernels address what `window` points to.
  virtual void reach(const std::byte* window) = 0;
  /// Sets `bytes` at `memory` to zero; waits for nothing.
  virtual void clear(void* memory, std::size_t bytes, Stream stream) = 0;
  /// CTAs of this rank that run at once with those of all ranks of its device. Collective.
  [[nodiscard]] virtual int count_ctas(Transport& transport, const ExchangeConfig& config) = 0;
  [[nodiscard]] virtual bool is_capturing(Stream stream) = 0;
  virtual void synchronize(Stream stream) = 0;

  // Kernels. Asynchronous on the stream, and they may be captured.
  virtual void route(const cuda::RailSlot& p, const cuda::RailTokens& d, Stream stream) = 0;
  /// Quantizes, too. Counts clipped values in p.state->stats.
  virtual void pack(const cuda::RailSlot& p, const cuda::RailTokens& d, WireFormat wire,
                    int num_ctas, Stream stream) = 0;
  virtual void sizes(const cuda::RailSlot& p, Stream stream) = 0;
  /// count and place.
  virtual void place(const cuda::RailSlot& p, const cuda::RailTokens& d, Stream stream) = 0;
  /// spread and finish.
  virtual void spread(const cuda::RailSlot& p, int num_ctas, Stream stream) = 0;
  virtual void give(const cuda::RailSlot& p, bool dropped, Stream stream) = 0;
  /// give, if it `sends`, await and relay.
  virtual void relay(const cuda::RailSlot& p, bool sends, int num_ctas, Stream stream) = 0;
  virtual void sum(const cuda::RailSlot& p, const cuda::RailTokens& d, int num_ctas,
                   Stream stream) = 0;
  virtual void keep_rows(const cuda::RailSlot& p, const std::uint16_t* expert_y, int num_ctas,
                         Stream stream) = 0;
};

/// Of the CUDA device `device`.
[[nodiscard]] std::unique_ptr<RailDevice> make_cuda_rail_device(int device);

}  // namespace sluice
