#include "transport/frame.h"

#include <fmt/core.h>

#include <cstring>

namespace sluice {
namespace {

constexpr std::uint32_t kMagic = 0x434c5331;

std::size_t padded(std::size_t bytes) {
  return (bytes + 7) / 8 * 8;
}

/// Four independent lanes, so that it runs at the speed of memory. Every frame is a multiple of 8.
std::uint64_t checksum_of(std::span<const std::byte> bytes, std::uint64_t seed) {
  constexpr std::uint64_t kPrime = 0x9e3779b97f4a7c15;
  std::uint64_t lane[4] = {seed, ~seed, seed * kPrime, 1};
  std::uint64_t word[4] = {};
  std::size_t at = 0;
  for (; at + sizeof(word) <= bytes.size(); at += sizeof(word)) {
    std::memcpy(word, bytes.data() + at, sizeof(word));
    for (int i = 0; i < 4; ++i) {
      lane[i] = (lane[i] ^ word[i]) * kPrime;
      lane[i] ^= lane[i] >> 29;
    }
  }
  std::memset(word, 0, sizeof(word));
  std::memcpy(word, bytes.data() + at, bytes.size() - at);
  std::uint64_t sum = bytes.size();
  for (int i = 0; i < 4; ++i) {
    sum = (sum ^ lane[i] ^ word[i]) * kPrime;
    sum ^= sum >> 32;
  }
  return sum;
}

std::string check_header(std::span<const std::byte> frame, std::uint64_t expected_sequence) {
  if (frame.size() < sizeof(FrameHeader)) {
    return fmt::format("message of {} bytes, a header alone has {}", frame.size(),
                       sizeof(FrameHeader));
  }
  FrameHeader header;
  std::memcpy(&header, frame.data(), sizeof(header));
  if (header.magic != kMagic) {
    return fmt::format("message begins with {:08x}, not {:08x}", header.magic, kMagic);
  }
  if (header.num_bytes != frame.size()) {
    return fmt::format("message number {} has {} bytes, its header says {}", header.sequence,
                       frame.size(), header.num_bytes);
  }
  const std::uint64_t sum = checksum_of(frame.subspan(sizeof(header)), header.sequence);
  if (sum != header.checksum) {
    return fmt::format("message number {}: checksum {:016x}, its header says {:016x}",
                       header.sequence, sum, header.checksum);
  }
  if (header.sequence != expected_sequence) {
    return fmt::format("message number {} where number {} was expected", header.sequence,
                       expected_sequence);
  }
  return {};
}

}  // namespace

std::size_t FrameWriter::room() const noexcept {
  const std::size_t used = bytes_.size() + sizeof(Record);
  return used < kFrameBytes ? (kFrameBytes - used) / 8 * 8 : 0;
}

bool FrameWriter::fits(std::size_t payload_bytes) const noexcept {
  return bytes_.size() + sizeof(Record) + padded(payload_bytes) <= kFrameBytes;
}

void FrameWriter::append(Record record, std::span<const std::byte> payload) {
  record.num_bytes = static_cast<std::uint32_t>(payload.size());
  const std::size_t at = bytes_.size();
  bytes_.resize(at + sizeof(record) + padded(payload.size()));
  std::memcpy(&bytes_[at], &record, sizeof(record));
  if (payload.empty()) return;
  std::memcpy(&bytes_[at + sizeof(record)], payload.data(), payload.size());
  std::memset(&bytes_[at + sizeof(record)] + payload.size(), 0,
              padded(payload.size()) - payload.size());
}

std::vector<std::byte> FrameWriter::seal(std::uint64_t sequence, std::vector<std::byte> next) {
  const std::span<const std::byte> body = std::span(bytes_).subspan(sizeof(FrameHeader));
  const FrameHeader header{.magic = kMagic,
                           .num_bytes = static_cast<std::uint32_t>(bytes_.size()),
                           .sequence = sequence,
                           .checksum = checksum_of(body, sequence)};
  std::memcpy(bytes_.data(), &header, sizeof(header));
  std::swap(bytes_, next);
  bytes_.resize(sizeof(FrameHeader));
  return next;
}

std::string read_frame(
    std::span<const std::byte> frame, std::uint64_t expected_sequence,
    const std::function<void(const Record&, std::span<const std::byte>)>& apply) {
  if (std::string wrong = check_header(frame, expected_sequence); !wrong.empty()) return wrong;
  // Twice over the records: first their lengths, so that a frame is applied whole or not at all.
  for (const bool applying : {false, true}) {
    for (std::size_t at = sizeof(FrameHeader); at < frame.size();) {
      Record record;
      if (frame.size() - at < sizeof(record)) {
        return fmt::format("message number {} ends within a record", expected_sequence);
      }
      std::memcpy(&record, frame.data() + at, sizeof(record));
      at += sizeof(record);
      if (padded(record.num_bytes) > frame.size() - at) {
        return fmt::format("message number {} ends within a payload of {} bytes", expected_sequence,
                           record.num_bytes);
      }
      if (applying) apply(record, frame.subspan(at, record.num_bytes));
      at += padded(record.num_bytes);
    }
  }
  return {};
}

}  // namespace sluice
