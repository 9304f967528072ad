// bindings.h - what the binding files share: owners of C++ objects, as Python sees them.
//
// A borrowed C++ object is held by a reference to the Python object that owns it, declared before
// the borrower so that it goes last.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "arrays.h"
#include "gil.h"
#include "sluice/backend.h"
#include "sluice/checkpoint.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/exchange.h"
#include "sluice/experts.h"
#include "sluice/hosts.h"
#include "sluice/layer.h"
#include "sluice/transport.h"
#include "whole.h"

namespace sluice::python {

/// As Python's str has a text with names of files in it: their bytes may be no UTF-8.
[[nodiscard]] nb::str text_of(std::string_view text);

/// What a backend is doing. kRepeated: a call that came before, which takes microseconds.
enum class Use : std::uint8_t { kNone, kCall, kRepeated };

struct PyBackend {
  std::unique_ptr<Backend> backend;
  std::atomic<Use> use{Use::kNone};
  [[nodiscard]] Device device() const { return backend->device(); }
};

struct PyTransport {
  std::unique_ptr<Transport> transport;
  std::atomic<bool> busy{false};
};

/// The library serves one thread at a time; a second one is refused here instead of finding out.
class Exclusive {
 public:
  Exclusive(std::atomic<bool>& flag, const char* name) : flag_(flag) {
    if (flag.exchange(true, std::memory_order_acquire)) refuse(name);
  }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;
  ~Exclusive() { flag_.store(false, std::memory_order_release); }

  [[noreturn]] static void refuse(const char* name) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(name) + ": in use by another thread; give each rank one of its own");
  }

 private:
  std::atomic<bool>& flag_;
};

/// The same of a backend. Repeated calls of other threads are waited for.
class BackendUse {
 public:
  explicit BackendUse(PyBackend& backend) : backend_(backend) {
    for (Use found = Use::kNone;
         !backend.use.compare_exchange_weak(found, Use::kCall, std::memory_order_acquire);
         found = Use::kNone) {
      if (found == Use::kCall) Exclusive::refuse("backend");
      const Released released;
      std::this_thread::yield();
    }
  }
  /// For a repeated call, if nobody uses the backend.
  BackendUse(PyBackend& backend, std::try_to_lock_t) : backend_(backend) {
    Use found = Use::kNone;
    is_held_ =
        backend.use.compare_exchange_strong(found, Use::kRepeated, std::memory_order_acquire);
  }
  BackendUse(const BackendUse&) = delete;
  BackendUse& operator=(const BackendUse&) = delete;
  ~BackendUse() {
    if (is_held_) backend_.use.store(Use::kNone, std::memory_order_release);
  }
  [[nodiscard]] bool is_held() const noexcept { return is_held_; }

 private:
  PyBackend& backend_;
  bool is_held_ = true;
};

/// A C++ call in progress, without the interpreter's lock: no Python object may be touched.
class Call {
 public:
  explicit Call(PyBackend& backend) : backend_(backend) {}
  Call(PyBackend& backend, PyTransport& transport) : backend_(backend) {
    transport_.emplace(transport.busy, "transport");
  }

 private:
  BackendUse backend_;
  std::optional<Exclusive> transport_;
  Released released_;
};

struct PyRouting {
  nb::object idx_object, weights_object;
  Input idx, weights;
  [[nodiscard]] Routing view() const {
    return {.topk_idx = idx.view, .topk_weights = weights.view};
  }
};

struct PyExchange {
  nb::object transport_object, backend_object;
  PyBackend* backend;
  std::optional<Exchange> exchange;
};

struct PyDispatched {
  nb::object exchange_object, routing_object;
  PyExchange* exchange;
  std::int64_t num_tokens;
  Framework framework;              ///< Of x.
  std::optional<Dispatched> value;  ///< Empty once consumed.
};

struct PyExpertBatch {
  nb::object x, x_scale, num_rows, row_begin;
  Mode layout = Mode::kLowLatency;
  int expected_m = 0;
};

struct PyExperts {
  nb::object backend_object;
  PyBackend* backend;
  nb::object memory;  ///< The caller's, where the packed weights lie; or none.
  std::optional<Experts> experts;
};

struct PyLayerGroup {
  nb::object transport_object, backend_object;
  PyBackend* backend;
  PyTransport* transport;
  std::optional<LayerGroup> group;
};

struct PyLayer {
  nb::object transport_object, backend_object;
  PyBackend* backend;
  int hidden;
  std::optional<Mode> only_mode;
  std::optional<Layer> layer;
};

/// A Layer in a group of its own.
struct PyEngine : PyLayer {};

/// A Python function that is told the fraction done, or None.
using ProgressArgument = std::optional<nb::callable>;

/// Calls `progress` and looks for signals, with the GIL: what either raises ends the load. Borrows
/// `progress`. To be made with the GIL held, and used without it.
[[nodiscard]] LoadOptions load_options(const ProgressArgument& progress, int num_threads);
[[nodiscard]] nb::dict load_stats_dict(const LoadStats& stats);

using Name = std::optional<std::string_view>;

[[nodiscard]] inline std::optional<Recipe> recipe_or_none(const Name& name) {
  return name ? std::optional(parse_recipe(*name)) : std::nullopt;
}
/// As Python names them; without a dtype, what the environment says.
[[nodiscard]] ModeRecipes recipes_of(const Name& low_latency, const Name& normal,
                                     const Name& dispatch_dtype);
[[nodiscard]] PyLayer make_layer(nb::object transport, nb::object backend_object,
                                 PyBackend* backend, const LayerGroupConfig& config, Layer layer);
[[nodiscard]] nb::dict memory_dict(const LayerGroupMemory& memory);

/// Positive milliseconds, or what the environment says.
[[nodiscard]] inline std::chrono::milliseconds timeout_or_environment(std::optional<int> ms) {
  return ms ? std::chrono::milliseconds(*ms) : read_environment().peer_timeout;
}

/// Of each rank's host; empty: those that the transport knows.
[[nodiscard]] inline Hosts hosts_or_transport(const std::vector<int>& host_of_rank) {
  return host_of_rank.empty() ? Hosts() : Hosts::create(host_of_rank);
}

/// x [num_tokens, hidden] of a dispatch.
[[nodiscard]] inline Input import_tokens(const Array& x, std::int64_t hidden, Device device) {
  const std::string shape = "[num_tokens, " + std::to_string(hidden) + "]";
  return import_input(x, {.name = "x",
                          .dtypes = {DType::kBFloat16},
                          .dims = {-1, hidden},
                          .shape = shape.c_str(),
                          .device = device});
}

/// Makes sluice.Error of the library's.
void bind_errors();
void bind_recipe(nb::module_& m);
void bind_placement(nb::module_& m);
void bind_repack(nb::module_& m);
void bind_backend(nb::module_& m);
void bind_transport(nb::module_& m);
void bind_checkpoint(nb::module_& m);
void bind_exchange(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_layer(nb::module_& m);
void bind_layer_group(nb::module_& m);
void bind_local(nb::module_& m);
void bind_repeated_calls(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_workload(nb::module_& m);
void bind_accuracy(nb::module_& m);

}  // namespace sluice::python
