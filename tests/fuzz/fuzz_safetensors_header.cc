// Feeds arbitrary bytes to the safetensors header parser as if they were a whole file. It must
// refuse with kCorruptFile, or return a header whose every promise holds.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>

#include "checkpoint/safetensors.h"
#include "sluice/error.h"

namespace {

/// What every user of an accepted header relies on: the tensors tile the data exactly.
bool header_keeps_its_promises(const sluice::SafetensorsHeader& header, std::size_t file_bytes) {
  if (header.data_begin < 8 || header.data_begin > file_bytes) return false;
  std::uint64_t covered = 0;
  for (const sluice::SafetensorsEntry& t : header.tensors) {
    if (t.begin != covered || t.end < t.begin) return false;
    if (t.shape.size() > sluice::kMaxSafetensorsRank) return false;
    covered = t.end;
  }
  return covered == file_bytes - header.data_begin;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::span file(data, size);
    const auto header = sluice::parse_safetensors_header(std::as_bytes(file), "input");
    if (!header_keeps_its_promises(header, size)) std::abort();
  } catch (const sluice::Error& error) {
    // Sound files of another kind are told by their first bytes.
    const bool is_other_kind =
        error.code() == sluice::ErrorCode::kUnsupported &&
        std::string_view(error.what()).find("is no safetensors file") != std::string_view::npos;
    if (error.code() != sluice::ErrorCode::kCorruptFile && !is_other_kind) std::abort();
  }
  return 0;
}
