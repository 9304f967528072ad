// tensor.h - typed, shaped views of memory that somebody else owns.
//
// A view is dense and row-major (the last dimension is contiguous) and says which device its bytes
// live on. `TensorView` is read-only and is used for inputs, `MutableTensorView` for outputs, so
// that swapping the two does not compile. Views are cheap values; copying one copies no data.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace sluice {

enum class DType : std::uint8_t {
  kUInt8,
  kInt8,
  kInt32,
  kInt64,
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat8E4M3,  ///< OCP e4m3fn: no infinities, largest value 448, NaN = 0x7f and 0xff.
  kPackedInt4,  ///< Two signed 4-bit values per byte, even index low. Its shape counts bytes.
  kPackedE2M1,  ///< Two OCP e2m1 values per byte, even index low. Its shape counts bytes.
  kFloat8E8M0,  ///< OCP e8m0: 2^(code - 127), no sign, no zero; 0xff is NaN.
};

[[nodiscard]] std::size_t size_bytes(DType dtype) noexcept;
[[nodiscard]] const char* to_string(DType dtype) noexcept;

/// Where memory lives. `index` counts devices of a kind; host memory has index 0.
struct Device {
  enum class Kind : std::uint8_t { kHost, kCuda };
  Kind kind = Kind::kHost;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

/// Dimensions of a view, at most four.
class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims);  ///< Throws: kInvalidArgument past kMaxRank.

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] std::int64_t operator[](int i) const noexcept { return dims_[i]; }
  [[nodiscard]] std::int64_t num_elements() const noexcept;
  [[nodiscard]] std::string to_string() const;  ///< "[4, 7168]"
  friend bool operator==(const Shape&, const Shape&) = default;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

namespace internal {
template <class Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  DType dtype = DType::kFloat32;
  Shape shape;
  Device device{};

  [[nodiscard]] bool empty() const noexcept { return data == nullptr; }
  [[nodiscard]] std::int64_t dim(int i) const noexcept { return shape[i]; }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(shape.num_elements()) * size_bytes(dtype);
  }
};
}  // namespace internal

struct MutableTensorView : internal::BasicTensorView<void*> {
  template <class T>
  [[nodiscard]] T* as() const noexcept {
    return static_cast<T*>(data);
  }
};

struct TensorView : internal::BasicTensorView<const void*> {
  TensorView() = default;
  TensorView(const void* data_in, DType dtype_in, Shape shape_in, Device device_in = {}) {
    data = data_in, dtype = dtype_in, shape = shape_in, device = device_in;
  }
  /// Anything that may be written may be read; never the other way round.
  TensorView(const MutableTensorView& v)  // NOLINT(google-explicit-constructor)
      : TensorView(v.data, v.dtype, v.shape, v.device) {}

  template <class T>
  [[nodiscard]] const T* as() const noexcept {
    return static_cast<const T*>(data);
  }
};

}  // namespace sluice
