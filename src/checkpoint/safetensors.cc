#include "checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string_view>
#include <utility>

#include "checkpoint/file_kind.h"
#include "checkpoint/json_reader.h"
#include "core/fail.h"

namespace sluice {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are stored little endian");

constexpr std::uint64_t kLengthBytes = 8;
/// More than kind_of_file() looks at.
constexpr std::uint64_t kKindBytes = 512;

struct DTypeBits {
  std::string_view name;
  int bits;
};
constexpr DTypeBits kDTypes[] = {
    {"BOOL", 8},        {"U8", 8},          {"I8", 8},      {"F8_E4M3", 8}, {"F8_E5M2", 8},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F8_E8M0", 8}, {"I16", 16},    {"U16", 16},
    {"F16", 16},        {"BF16", 16},       {"I32", 32},    {"U32", 32},    {"F32", 32},
    {"I64", 64},        {"U64", 64},        {"F64", 64},    {"C64", 64},    {"F4", 4},
    {"F6_E2M3", 6},     {"F6_E3M2", 6},
};

/// Product of the dimensions; empty if it does not fit in 64 bits.
std::optional<std::uint64_t> num_elements(std::span<const std::uint64_t> shape) noexcept {
  // A zero anywhere makes the product zero, however large its neighbours.
  if (std::ranges::find(shape, std::uint64_t{0}) != shape.end()) return 0;
  std::uint64_t product = 1;
  for (const std::uint64_t dim : shape) {
    if (__builtin_mul_overflow(product, dim, &product)) return std::nullopt;
  }
  return product;
}

/// Bytes of a tensor; empty if they overflow or are not whole.
std::optional<std::uint64_t> tensor_bytes(std::span<const std::uint64_t> shape, int bits) noexcept {
  const auto elements = num_elements(shape);
  std::uint64_t total_bits = 0;
  if (!elements || __builtin_mul_overflow(*elements, static_cast<std::uint64_t>(bits), &total_bits))
    return std::nullopt;
  if (total_bits % 8 != 0) return std::nullopt;
  return total_bits / 8;
}

SafetensorsEntry read_entry(JsonReader& json, const std::string& name) {
  SafetensorsEntry entry{.name = name, .dtype = {}, .shape = {}};
  bool has_dtype = false, has_shape = false, has_offsets = false;
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      entry.dtype = json.string();
      has_dtype = true;
    } else if (key == "shape") {
      json.array([&] {
        if (entry.shape.size() == kMaxSafetensorsRank) {
          json.error(fmt::format("tensor {}: more than {} dimensions", name, kMaxSafetensorsRank));
        }
        entry.shape.push_back(json.unsigned_integer());
      });
      has_shape = true;
    } else if (key == "data_offsets") {
      std::array<std::uint64_t, 2> offsets{};
      std::size_t count = 0;
      json.array([&] {
        if (count == 2) json.error(fmt::format("tensor {}: more than two data_offsets", name));
        offsets[count++] = json.unsigned_integer();
      });
      if (count != 2) json.error(fmt::format("tensor {}: {} data_offsets, not 2", name, count));
      entry.begin = offsets[0], entry.end = offsets[1];
      has_offsets = true;
    } else {
      json.error(fmt::format("tensor {}: unknown field '{}'", name, key));
    }
  });
  if (!has_dtype || !has_shape || !has_offsets) {
    json.error(fmt::format("tensor {}: {} is missing", name,
                           !has_dtype   ? "dtype"
                           : !has_shape ? "shape"
                                        : "data_offsets"));
  }
  return entry;
}

/// What one entry claims about itself, against the number of data bytes in the file.
void check_entry(const SafetensorsEntry& t, std::uint64_t data_bytes, const std::string& source) {
  if (t.begin > t.end) {
    fail(ErrorCode::kCorruptFile, "{}: tensor {}: data_offsets [{}, {}] run backwards", source,
         t.name, t.begin, t.end);
  }
  if (t.end > data_bytes) {
    fail(ErrorCode::kCorruptFile,
         "{}: tensor {}: data_offsets [{}, {}] pass the end of the file's {} data bytes "
         "(truncated?)",
         source, t.name, t.begin, t.end, data_bytes);
  }
  const std::uint64_t size = t.end - t.begin;
  if (const auto bits = safetensors_dtype_bits(t.dtype)) {
    const auto expected = tensor_bytes(t.shape, *bits);
    if (!expected) {
      fail(ErrorCode::kCorruptFile, "{}: tensor {}: shape {} of {} has no size below 2^61 bytes",
           source, t.name, to_string(t.shape), t.dtype);
    }
    if (*expected != size) {
      fail(ErrorCode::kCorruptFile,
           "{}: tensor {}: data_offsets [{}, {}] hold {} bytes, but {} of shape {} needs {}",
           source, t.name, t.begin, t.end, size, t.dtype, to_string(t.shape), *expected);
    }
    return;
  }
  // A dtype we do not know: harmless as long as its size is plausible; nothing reads it.
  constexpr std::uint64_t kMaxBits = 128;
  const auto elements = num_elements(t.shape);
  const bool is_plausible = elements && (*elements == 0 ? size == 0
                                                        : size * 8 % *elements == 0 && size > 0 &&
                                                              size * 8 / *elements <= kMaxBits);
  if (!is_plausible || size >= std::uint64_t{1} << 60) {
    fail(ErrorCode::kCorruptFile,
         "{}: tensor {}: {} bytes for unknown dtype '{}' of shape {} are no whole number of bits "
         "in [1, {}] each",
         source, t.name, size, t.dtype, to_string(t.shape), kMaxBits);
  }
}

/// The format allows neither gaps nor overlaps, nor bytes that belong to no tensor.
void check_coverage(const std::vector<SafetensorsEntry>& tensors, std::uint64_t data_bytes,
                    const std::string& source) {
  std::uint64_t covered = 0;
  const SafetensorsEntry* previous = nullptr;
  for (const SafetensorsEntry& t : tensors) {
    if (t.begin != covered) {
      fail(ErrorCode::kCorruptFile, "{}: tensor {}: data_offsets [{}, {}] {} {}, which ends at {}",
           source, t.name, t.begin, t.end, t.begin < covered ? "overlap" : "leave a gap after",
           previous ? "tensor " + previous->name : "the header", covered);
    }
    covered = t.end;
    previous = &t;
  }
  if (covered != data_bytes) {
    fail(ErrorCode::kCorruptFile, "{}: {} data bytes, but the tensors cover only {}", source,
         data_bytes, covered);
  }
}

std::string json_shape(std::span<const std::uint64_t> shape) {
  std::string text = "[";
  for (const std::uint64_t dim : shape) {
    if (text.size() > 1) text += ',';
    text += std::to_string(dim);
  }
  return text + "]";
}

}  // namespace

std::optional<int> safetensors_dtype_bits(std::string_view dtype) noexcept {
  for (const DTypeBits& d : kDTypes) {
    if (d.name == dtype) return d.bits;
  }
  return std::nullopt;
}

std::string to_string(std::span<const std::uint64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::vector<std::byte> read_safetensors_head(const MappedFile& file) {
  const std::uint64_t size = file.bytes().size();
  std::vector<std::byte> head(std::min(size, kKindBytes));
  const auto read_from = [&](std::size_t at) {
    if (file.read(at, std::span(head).subspan(at)) == head.size() - at) return;
    file.check_is_whole();
    fail(ErrorCode::kCorruptFile, "{}: became shorter while its header was read",
         file.path().string());
  };
  read_from(0);
  if (size < kLengthBytes) return head;
  std::uint64_t length = 0;
  std::memcpy(&length, head.data(), sizeof length);
  const std::size_t have = head.size();
  if (length > std::min(kMaxSafetensorsHeaderBytes, size - kLengthBytes)) return head;
  if (kLengthBytes + length <= have) return head;
  head.resize(kLengthBytes + length);
  read_from(have);
  return head;
}

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> head,
                                           std::uint64_t file_bytes, const std::string& source) {
  if (file_bytes < kLengthBytes) {
    fail(ErrorCode::kCorruptFile, "{}: {} bytes; a safetensors file has at least {}", source,
         file_bytes, kLengthBytes);
  }
  std::uint64_t length = 0;
  std::memcpy(&length, head.data(), sizeof length);
  const std::uint64_t limit = std::min(kMaxSafetensorsHeaderBytes, file_bytes - kLengthBytes);
  // No header is that long, but other files begin so.
  const std::string_view kind =
      kind_of_file({reinterpret_cast<const char*>(head.data()), head.size()});
  if (length > limit && !kind.empty()) {
    fail(ErrorCode::kUnsupported, "{}: is no safetensors file, but {}", source, kind);
  }
  if (length > limit) {
    fail(ErrorCode::kCorruptFile, "{}: header length {} is above {} ({})", source, length, limit,
         limit == kMaxSafetensorsHeaderBytes ? "the most that is accepted"
                                             : "what is left of the file; truncated?");
  }
  const auto header = head.subspan(kLengthBytes, length);
  JsonReader json({reinterpret_cast<const char*>(header.data()), header.size()}, source);
  SafetensorsHeader result{.tensors = {}, .data_begin = kLengthBytes + length};
  const std::uint64_t data_bytes = file_bytes - result.data_begin;
  json.object([&](const std::string& key) {
    if (key == "__metadata__") {
      json.object([&](const std::string&) { (void)json.string(); });
      return;
    }
    result.tensors.push_back(read_entry(json, key));
    check_entry(result.tensors.back(), data_bytes, source);
  });
  json.finish();
  std::ranges::sort(result.tensors, [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  check_coverage(result.tensors, data_bytes, source);
  return result;
}

std::string make_safetensors_header(std::span<SafetensorsEntry> tensors) {
  std::string text = R"({"__metadata__":{"format":"pt"})";
  std::uint64_t at = 0;
  for (SafetensorsEntry& t : tensors) {
    const auto bits = safetensors_dtype_bits(t.dtype);
    check_argument(bits.has_value(), "tensor {}: dtype '{}' is not one of the format's", t.name,
                   t.dtype);
    const auto bytes = tensor_bytes(t.shape, *bits);
    check_argument(bytes.has_value(), "tensor {}: shape {} of {} has no size", t.name,
                   to_string(t.shape), t.dtype);
    t.begin = at, t.end = at + *bytes, at = t.end;
    text += fmt::format(",{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}",
                        json_string(t.name), t.dtype, json_shape(t.shape), t.begin, t.end);
  }
  text += '}';
  text.append((8 - (kLengthBytes + text.size()) % 8) % 8, ' ');
  const std::uint64_t length = text.size();
  check_argument(length <= kMaxSafetensorsHeaderBytes, "a header of {} bytes; at most {}", length,
                 kMaxSafetensorsHeaderBytes);
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file + text;
}

}  // namespace sluice
