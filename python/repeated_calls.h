// repeated_calls.h - calls that come again, as a decode loop makes them: with the same memory, or
// with other memory of the same form.
//
// A form is everything of a call's tensors that anything here looks at but their addresses: element
// type, device, shape and strides. What the tensors hold is none of it. Python objects are not
// remembered: other tensors over the same memory are the same call.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings.h"
#include "sluice/local_experts.h"

namespace sluice::python {

/// Of one argument; `ndim` is -1 for one that is not there.
struct TensorForm {
  static constexpr int kMaxRank = 3;
  std::array<std::int64_t, kMaxRank> shape{}, strides{};
  std::int32_t ndim = -1, device_type = 0, device_index = 0;
  std::uint8_t code = 0, bits = 0;
  std::uint16_t lanes = 0;
  bool operator==(const TensorForm&) const = default;
};

/// A call's tensors. kRouting: topk_idx, or the rows of each expert; kWeights: none for a batch.
enum CallTensor : std::uint8_t { kX, kRouting, kWeights, kScale, kY, kNumCallTensors };

struct CallForm {
  std::array<TensorForm, kNumCallTensors> tensors;
  int expected_m = 0;
  bool operator==(const CallForm&) const = default;
};
struct CallId {
  std::array<const std::byte*, kNumCallTensors> data{};  // First, since it tells most apart.
  CallForm form;
  bool operator==(const CallId&) const = default;
};
/// What the tensors were taken for: frameworks without bfloat16 bring its bits.
using CallDtypes = std::array<DType, kNumCallTensors>;

/// The last of their kind; the oldest makes room.
template <class Key, class Value, std::size_t kNum>
class Recent {
 public:
  struct Entry {
    Key key;
    Value value;
    std::uint64_t last_use = 0;  ///< 0: never.
  };
  [[nodiscard]] Entry* find(const Key& key) {
    for (Entry& entry : entries_) {
      if (entry.last_use == 0 || entry.key != key) continue;
      entry.last_use = ++now_;
      return &entry;
    }
    return nullptr;
  }
  /// Requires: find() did not find it.
  void add(const Key& key, Value value) {
    Entry& oldest = *std::ranges::min_element(entries_, {}, &Entry::last_use);
    oldest.value = std::move(value), oldest.key = key, oldest.last_use = ++now_;
  }

 private:
  std::array<Entry, kNum> entries_;
  std::uint64_t now_ = 0;
};

/// The last calls of some LocalExperts. They are forgotten before the LocalExperts go.
/// Threads: one at a time, as the LocalExperts.
class RepeatedCalls {
 public:
  /// The call to run if it was kept.
  [[nodiscard]] LocalCall* find(const CallId& id);
  /// The dtypes of a call of this form that was made, and so was checked.
  [[nodiscard]] const CallDtypes* find(const CallForm& form);
  /// To be asked of each call that find() did not know and that was made: one that came before is
  /// worth keeping. Remembers it.
  bool came_before(const CallId& id);
  void keep(const CallId& id, LocalCall call);
  void keep(const CallForm& form, const CallDtypes& dtypes);
  /// How often find() found a call.
  [[nodiscard]] std::int64_t num_repeated() const noexcept { return num_repeated_; }

 private:
  Recent<CallId, std::optional<LocalCall>, 8> calls_;  // Batch sizes of one layer and recipe.
  // Numbers of tokens vary more.
  Recent<CallForm, CallDtypes, 64> forms_;
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
/// result is another call. Nothing is known of arrays of other frameworks than framework.h's.
class KnownCall {
 public:
  KnownCall(PyLocalExperts& self, const Array& x, const Array& routing, const Array* weights,
            const std::optional<Array>& x_scale, int expected_m, const std::optional<Array>& out);
  [[nodiscard]] const std::optional<Array>& y() const noexcept { return y_; }

  /// True if it, or one of its form, came before: it is queued, on the framework's current stream.
  [[nodiscard]] bool run();
  /// The same, which one of several experts may know, whose first one this was made for. False also
  /// while another thread uses the backend.
  [[nodiscard]] bool run_in_one_of(const nb::list& experts);
  /// To be told when it has been made of these views.
  void was_made(const TensorView& x, const Routing& routing, const TensorView& x_scale,
                const MutableTensorView& y);
  void was_made(const ExpertBatch& batch, const MutableTensorView& y);

 private:
  [[nodiscard]] bool identify(CallTensor which, const Array* array);
  void make_result();
  /// Requires: the backend is this call's.
  [[nodiscard]] bool find_and_run();
  [[nodiscard]] TensorView view(CallTensor which, const CallDtypes& dtypes) const;
  void run_form(const CallDtypes& dtypes, Stream stream);
  void note(const CallDtypes& dtypes);

  PyLocalExperts* self_;
  Framework framework_;
  CallId id_;
  std::optional<Array> y_;
  bool is_identified_ = false;
};

}  // namespace sluice::python
