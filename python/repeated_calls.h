// repeated_calls.h - calls that come again with the same memory, as a decode loop makes them.
//
// A call is recognised by everything of its tensors that anything here looks at: address, element
// type, device, shape and strides. What the tensors hold is none of it. Python objects are not
// remembered: other tensors over the same memory are the same call.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings.h"
#include "sluice/local_experts.h"

namespace sluice::python {

/// One argument; `ndim` is -1 for one that is not there.
struct TensorId {
  static constexpr int kMaxRank = 3;
  const std::byte* data = nullptr;
  std::int32_t ndim = -1, device_type = 0, device_index = 0;
  std::uint8_t code = 0, bits = 0;
  std::uint16_t lanes = 0;
  std::array<std::int64_t, kMaxRank> shape{}, strides{};
  bool operator==(const TensorId&) const = default;
};

struct CallId {
  TensorId x, routing, weights, x_scale, y;  ///< `routing`: topk_idx, or the rows of each expert.
  int expected_m = 0;
  bool operator==(const CallId&) const = default;
};

/// nullptr: an argument that is not there. False for an array that no framework describes cheaply
/// (framework.h) or that has more dimensions than a call's tensors.
[[nodiscard]] bool identify(const Array* array, TensorId& id);

/// The last calls of some LocalExperts. They are forgotten before the LocalExperts go.
/// Threads: one at a time, as the LocalExperts.
class RepeatedCalls {
 public:
  /// The call to run if it was kept.
  [[nodiscard]] LocalCall* find(const CallId& id);
  /// To be told of each call that find() did not know and that was made: whether to keep it, which
  /// is so when it came before.
  [[nodiscard]] bool is_worth_keeping(const CallId& id);
  void keep(const CallId& id, LocalCall call);
  /// How often find() found one.
  [[nodiscard]] std::int64_t num_repeated() const noexcept { return num_repeated_; }

 private:
  struct Entry {
    CallId id;
    std::optional<LocalCall> call;
    std::uint64_t last_use = 0;  ///< 0: never.
  };
  [[nodiscard]] Entry* entry_of(const CallId& id);

  static constexpr std::size_t kNumEntries = 8;  // Batch sizes of one layer and recipe.
  std::array<Entry, kNumEntries> entries_;
  std::uint64_t now_ = 0;
  std::int64_t num_repeated_ = 0;
};

struct PyLocalExperts {
  nb::object backend_object;
  PyBackend* backend;
  int hidden;
  /// Of a token in the model, which bf16 rows of forward() may have: hidden, or less where that is
  /// padded.
  int token_width;
  nb::object memory;  ///< As PyExperts'.
  std::optional<LocalExperts> experts;
  std::string x_shape =  ///< For messages.
      "[num_tokens, " + std::to_string(hidden) +
      (token_width == hidden ? "]" : " or, of bfloat16, " + std::to_string(token_width) + "]");
  RepeatedCalls calls = {};
};

/// A call that may have come before. Its result is made here if the caller brought none: another
/// result is another call. Nothing is known of arrays that identify() does not take.
class KnownCall {
 public:
  KnownCall(PyLocalExperts& self, const Array& x, const Array& routing, const Array* weights,
            const std::optional<Array>& x_scale, int expected_m, const std::optional<Array>& out);
  [[nodiscard]] const std::optional<Array>& y() const noexcept { return y_; }

  /// True if it came before and is queued again, on the framework's current stream.
  [[nodiscard]] bool run();
  /// To be told when it has been made. `keep` makes a LocalCall of its tensors.
  template <class Keep>
  void was_made(const Keep& keep) {
    if (!is_identified_) return;
    const Exclusive exclusive(*self_.backend);
    if (self_.calls.is_worth_keeping(id_)) self_.calls.keep(id_, keep());
  }

 private:
  void make_result();

  PyLocalExperts& self_;
  Framework framework_;
  CallId id_;
  std::optional<Array> y_;
  bool is_identified_ = false;
};

}  // namespace sluice::python
