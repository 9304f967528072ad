#include "checkpoint/formats/part_readers.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "core/fail.h"
#include "quant/scale_limit.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Index of the first element that is not positive and below kScaleLimit; -1 if there is none. Bits
/// of such numbers are 1 .. (bits of the limit - 1), whatever their width.
template <class Bits>
std::int64_t find_bad_scale(const Bits* bits, std::int64_t count) noexcept {
  constexpr auto kLimit =
      static_cast<Bits>(std::bit_cast<std::uint32_t>(kScaleLimit) >> (32 - 8 * sizeof(Bits)));
  const auto is_bad = [](Bits b) {
    return static_cast<Bits>(b - 1) >= static_cast<Bits>(kLimit - 1);
  };
  constexpr std::int64_t kBlock = 4096;
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, count);
    unsigned any = 0;
    for (std::int64_t i = begin; i < end; ++i) any |= static_cast<unsigned>(is_bad(bits[i]));
    if (!any) continue;
    for (std::int64_t i = begin; i < end; ++i) {
      if (is_bad(bits[i])) return i;
    }
  }
  return -1;
}

void check_stored_scales(const TensorRef& tensor, const TensorView& view) {
  const std::int64_t count = view.shape.num_elements();
  const bool is_f32 = view.dtype == DType::kFloat32;
  const std::int64_t bad = is_f32 ? find_bad_scale(view.as<std::uint32_t>(), count)
                                  : find_bad_scale(view.as<std::uint16_t>(), count);
  if (bad < 0) return;
  const float value = is_f32 ? view.as<float>()[bad] : bf16_to_float(view.as<std::uint16_t>()[bad]);
  const bool is_large = std::isfinite(value) && value > 0;
  fail(is_large ? ErrorCode::kUnsupported : ErrorCode::kCorruptFile,
       "{}: scale [{}, {}] = {} is not {}", place(tensor), bad / view.dim(1), bad % view.dim(1),
       value, is_large ? "below 2^118" : "a positive finite number");
}

void keep_file(ExpertStorage& storage, const TensorRef& tensor) {
  if (std::ranges::find(storage.files, tensor.file) == storage.files.end()) {
    storage.files.push_back(tensor.file);
  }
}

float read_scalar(const TensorRef& tensor) {
  if (tensor.entry.dtype == "F32") {
    float value = 0;
    read_tensor(tensor, 0, std::as_writable_bytes(std::span(&value, 1)));
    return value;
  }
  std::uint16_t bits = 0;
  read_tensor(tensor, 0, std::as_writable_bytes(std::span(&bits, 1)));
  return tensor.entry.dtype == "F16" ? f16_to_float(bits) : bf16_to_float(bits);
}

/// The sizes of experts that have a part of such a shape: "; it would fit hidden 512 and
/// intermediate 128". Empty if no whole sizes have one.
std::string fitting_sizes(const std::vector<std::uint64_t>& shape, const PartSpec& spec,
                          const MatrixLayout& matrix) {
  if (shape.size() != 2 || spec.shape.size() != 2) return {};
  const auto k = static_cast<std::uint64_t>(matrix.k);
  if (spec.name.find("scale") != std::string::npos && shape[0] == spec.shape[0] &&
      shape[0] == static_cast<std::uint64_t>(matrix.n) && shape[1] > 0 && k % shape[1] == 0) {
    return fmt::format("; so many are scales of groups of {}, and the configuration has {}",
                       k / shape[1], k / spec.shape[1]);
  }
  const std::uint64_t sizes[] = {static_cast<std::uint64_t>(matrix.n),
                                 static_cast<std::uint64_t>(matrix.k)};
  std::uint64_t fitting[2];
  for (std::size_t i = 0; i < 2; ++i) {
    // Sizes of a published model; larger ones would say nothing, and could overflow.
    if (shape[i] == 0 || shape[i] > 1'000'000 || shape[i] * sizes[i] % spec.shape[i] != 0)
      return {};
    fitting[i] = shape[i] * sizes[i] / spec.shape[i];
  }
  const bool is_down = matrix.role == MatrixLayout::Role::kDown;
  return fmt::format("; it would fit hidden {} and intermediate {}", fitting[is_down ? 0 : 1],
                     fitting[is_down ? 1 : 0]);
}

}  // namespace

const TensorRef& part_of(const ExpertTensors& expert, std::string_view part) {
  const TensorRef* const tensor = expert.find(part);
  SLUICE_ASSERT(tensor != nullptr);
  return *tensor;
}

void check_part(const TensorRef& tensor, const PartSpec& spec, const MatrixLayout* matrix) {
  const SafetensorsEntry& entry = tensor.entry;
  if (std::ranges::find(spec.dtypes, entry.dtype) == spec.dtypes.end()) {
    std::string list;
    for (const std::string_view name : spec.dtypes) {
      list += (list.empty() ? "" : " or ") + std::string(name);
    }
    fail(ErrorCode::kUnsupported, "{}: dtype {}, not {}", place(tensor), entry.dtype, list);
  }
  if (std::ranges::equal(entry.shape, spec.shape)) return;
  if (!spec.shape.empty()) {
    const bool is_transposed =
        std::equal(entry.shape.begin(), entry.shape.end(), spec.shape.rbegin(), spec.shape.rend());
    const std::string help = is_transposed ? " (transposed?)"
                             : matrix      ? fitting_sizes(entry.shape, spec, *matrix)
                                           : "";
    fail(ErrorCode::kUnsupported, "{}: shape {}, but the config's sizes need {}{}", place(tensor),
         to_string(entry.shape), to_string(spec.shape), help);
  }
  if (entry.shape != std::vector<std::uint64_t>{1}) {
    fail(ErrorCode::kUnsupported, "{}: shape {}, but one number has [] or [1]", place(tensor),
         to_string(entry.shape));
  }
}

float read_positive(const TensorRef& tensor, std::string_view what) {
  const float value = read_scalar(tensor);
  if (!std::isfinite(value) || value <= 0) {
    fail(ErrorCode::kCorruptFile, "{}: {} {} is not a positive finite number", place(tensor), what,
         value);
  }
  return value;
}

TensorView load_scales(const TensorRef& tensor, std::int64_t n, std::int64_t groups,
                       ExpertStorage& storage) {
  tensor.will_need();
  keep_file(storage, tensor);
  const auto bytes = tensor.bytes();
  const DType dtype = tensor.entry.dtype == "BF16" ? DType::kBFloat16 : DType::kFloat32;
  const void* data = bytes.data();
  if (tensor.entry.dtype == "F16") {
    const auto copy = allocate(storage, 2 * bytes.size());
    auto* const out = reinterpret_cast<float*>(copy.data());
    for (std::size_t i = 0; i < bytes.size() / 2; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, bytes.data() + 2 * i, sizeof bits);
      out[i] = f16_to_float(bits);
    }
    data = out;
  } else if (reinterpret_cast<std::uintptr_t>(data) % size_bytes(dtype) != 0) {
    const auto copy = allocate(storage, bytes.size());
    std::memcpy(copy.data(), bytes.data(), bytes.size());
    data = copy.data();
  }
  const TensorView view(data, dtype, {n, groups});
  check_stored_scales(tensor, view);
  return view;
}

TensorView load_e8m0(const TensorRef& tensor, std::int64_t n, std::int64_t groups,
                     ExpertStorage& storage) {
  tensor.will_need();
  keep_file(storage, tensor);
  const auto bytes = tensor.bytes();
  constexpr int kLargest = (std::bit_cast<std::uint32_t>(kScaleLimit) >> 23) - 1;
  const auto bad = std::ranges::find_if(
      bytes, [](std::byte code) { return std::to_integer<int>(code) > kLargest; });
  if (bad != bytes.end()) {
    const std::int64_t at = bad - bytes.begin();
    if (*bad == std::byte{0xff}) {
      fail(ErrorCode::kCorruptFile, "{}: scale [{}, {}] = nan (0xff) is not a power of two",
           place(tensor), at / groups, at % groups);
    }
    fail(ErrorCode::kUnsupported, "{}: scale [{}, {}] = 2^{} is not below 2^118", place(tensor),
         at / groups, at % groups, std::to_integer<int>(*bad) - 127);
  }
  return {bytes.data(), DType::kFloat8E8M0, {n, groups}};
}

std::vector<float> read_bias(const TensorRef& tensor, RowStep rows, std::int64_t n) {
  tensor.will_need();
  const std::byte* const bytes = tensor.bytes().data();
  const bool is_f32 = tensor.entry.dtype == "F32", is_f16 = tensor.entry.dtype == "F16";
  std::vector<float> out(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t row = rows.first + i * rows.step;
    float& value = out[static_cast<std::size_t>(i)];
    if (is_f32) {
      std::memcpy(&value, bytes + row * 4, 4);
    } else {
      std::uint16_t bits;
      std::memcpy(&bits, bytes + row * 2, 2);
      value = is_f16 ? f16_to_float(bits) : bf16_to_float(bits);
    }
    if (std::isfinite(value)) continue;
    fail(ErrorCode::kCorruptFile, "{}: bias [{}] = {} is not a finite number", place(tensor), row,
         value);
  }
  return out;
}

namespace {

/// Rows of `in`, each followed by `fill`, and rows of it alone at the end. An element of `fill` is
/// as large as one of `in`.
TensorView padded_rows(const TensorView& in, std::int64_t n, std::int64_t width,
                       std::span<const std::byte> fill, ExpertStorage& storage) {
  const std::size_t row = static_cast<std::size_t>(width) * fill.size();
  const std::size_t own = static_cast<std::size_t>(in.dim(1)) * fill.size();
  std::byte* const out = allocate(storage, static_cast<std::size_t>(n) * row).data();
  for (std::int64_t r = 0; r < n; ++r) {
    std::byte* const to = out + static_cast<std::size_t>(r) * row;
    const bool is_there = r < in.dim(0);
    if (is_there) std::memcpy(to, in.as<std::byte>() + static_cast<std::size_t>(r) * own, own);
    for (std::size_t at = is_there ? own : 0; at < row; at += fill.size()) {
      std::memcpy(to + at, fill.data(), fill.size());
    }
  }
  return {out, in.dtype, {n, width}};
}

}  // namespace

TensorView padded_codes(const TensorView& in, std::int64_t n, std::int64_t width,
                        ExpertStorage& storage) {
  constexpr std::byte kZero{};  // Of int4 and of e2m1.
  return padded_rows(in, n, width, {&kZero, 1}, storage);
}

TensorView padded_scales(const TensorView& in, std::int64_t n, std::int64_t width,
                         ExpertStorage& storage) {
  const float f32 = 1;
  const std::uint16_t bf16 = bf16_from_float(1);
  const std::uint8_t e8m0 = 127;
  switch (in.dtype) {
    case DType::kFloat32:
      return padded_rows(in, n, width, std::as_bytes(std::span(&f32, 1)), storage);
    case DType::kBFloat16:
      return padded_rows(in, n, width, std::as_bytes(std::span(&bf16, 1)), storage);
    default:
      SLUICE_ASSERT(in.dtype == DType::kFloat8E8M0);
      return padded_rows(in, n, width, std::as_bytes(std::span(&e8m0, 1)), storage);
  }
}

QuantMatrix padded(const QuantMatrix& in, const MatrixLayout& matrix, ExpertStorage& storage) {
  if (!matrix.is_padded()) return in;
  QuantMatrix out = in;
  out.codes = padded_codes(in.codes, matrix.padded_n, matrix.padded_k / 2, storage);
  out.scales = padded_scales(in.scales, matrix.padded_n, matrix.padded_k / in.group_size, storage);
  if (in.has_bias()) {
    const TensorView column(in.bias.data, DType::kFloat32, {1, matrix.n});
    const float zero = 0;
    out.bias = padded_rows(column, 1, matrix.padded_n, std::as_bytes(std::span(&zero, 1)), storage);
    out.bias.shape = {matrix.padded_n};
  }
  return out;
}

TensorView view_codes(const TensorRef& tensor, const MatrixLayout& matrix, ExpertStorage& storage,
                      WeightFormat format) {
  tensor.will_need();
  keep_file(storage, tensor);
  return {tensor.bytes().data(), code_dtype(format), {matrix.n, matrix.k / 2}};
}

TensorView load_offset_codes(const TensorRef& tensor, const MatrixLayout& matrix,
                             ExpertStorage& storage) {
  tensor.will_need();
  const auto in = tensor.bytes();
  std::byte* const out = allocate(storage, in.size()).data();
  flip_high_bits(in, out);
  tensor.release();
  return {out, DType::kPackedInt4, {matrix.n, matrix.k / 2}};
}

void flip_high_bits(std::span<const std::byte> in, std::byte* out) noexcept {
  // Words, since compilers do not widen a loop over bytes at every level of optimization.
  constexpr std::size_t kWord = sizeof(std::uint64_t);
  std::size_t i = 0;
  for (; i + kWord <= in.size(); i += kWord) {
    std::uint64_t word;
    std::memcpy(&word, in.data() + i, kWord);
    word ^= 0x8888888888888888U;
    std::memcpy(out + i, &word, kWord);
  }
  for (; i < in.size(); ++i) out[i] = in[i] ^ std::byte{0x88};
}

std::span<std::byte> allocate(ExpertStorage& storage, std::size_t bytes) {
  if (storage.room) {
    SLUICE_ASSERT(bytes <= storage.room->size());  // Format::copied_bytes() counts them.
    const auto taken = storage.room->first(bytes);
    storage.room = storage.room->subspan(std::min(aligned_in_room(bytes), storage.room->size()));
    return taken;
  }
  // Written in full by the caller, so not cleared here.
  storage.copies.push_back(std::unique_ptr<std::byte[]>(new std::byte[bytes]));
  return {storage.copies.back().get(), bytes};
}

float f16_to_float(std::uint16_t bits) noexcept {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (bits >> 10) & 0x1f;
  const auto mantissa = static_cast<float>(bits & 0x3ff);
  if (exponent == 0x1f) {
    const std::uint32_t high = static_cast<std::uint32_t>(bits & 0x8000) << 16;
    return std::bit_cast<float>(high | 0x7f800000U |
                                static_cast<std::uint32_t>(bits & 0x3ff) << 13);
  }
  if (exponent == 0) return sign * mantissa * 0x1p-24f;
  return sign * std::ldexp(1024.0f + mantissa, exponent - 25);
}

}  // namespace sluice
