// framework.h - a framework whose arrays have DLPack's C exchange API (torch): views of its
// tensors, new tensors and its current stream, without a call of Python and without linking to it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice::python {

namespace nb = nanobind;

struct ExchangeApi;  // DLPack's.

class Framework {
 public:
  Framework() = default;
  /// Of the type of `array`; false if it has no such API.
  [[nodiscard]] static Framework of(nb::handle array) noexcept;
  explicit operator bool() const noexcept { return api_ != nullptr; }

  /// Fills `tensor`, valid while `array` lives. False if the framework refuses, whose exception is
  /// cleared, or if the memory is not what the array holds: is_negated().
  [[nodiscard]] bool import(nb::handle array, nb::dlpack::dltensor& tensor) const noexcept;
  /// The same of a call that may have come before. Negatives come from complex numbers, whose parts
  /// are no integers and no e4m3: those are not asked, which takes as long as all else about them.
  [[nodiscard]] bool import_again(nb::handle array, nb::dlpack::dltensor& tensor) const noexcept;

  /// A new tensor, its contents unspecified, ordered on the current stream.
  /// Throws: kOutOfMemory with what the framework said.
  [[nodiscard]] nb::object allocate(const nb::dlpack::dtype& dtype,
                                    const std::vector<std::int64_t>& dims, Device device) const;

  /// A tensor over memory of somebody else; `owner` is kept alive.
  [[nodiscard]] nb::object wrap(const TensorView& view, const nb::dlpack::dtype& dtype,
                                nb::handle owner) const;

  /// The stream that the framework's own operations on `device` would be queued on now.
  [[nodiscard]] Stream current_stream(Device device) const;

 private:
  explicit Framework(const ExchangeApi* api) noexcept : api_(api) {}
  [[nodiscard]] bool describe(nb::handle array, nb::dlpack::dltensor& tensor) const noexcept;
  const ExchangeApi* api_ = nullptr;  // Lives as long as the process.
};

/// True of torch's views of the negative of what lies in memory, of which its DLPack says nothing.
[[nodiscard]] bool is_negated(nb::handle array) noexcept;

[[nodiscard]] nb::dlpack::device to_dlpack(Device device);

}  // namespace sluice::python
