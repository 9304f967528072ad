// frame.h - puts, signals and parts of gathers as bytes: what one process sends to another.
//
//   frame  = header | record | payload, padded to 8 | record | payload | ...
//   header = magic, bytes of the frame, sequence number of this pair of processes, checksum
//
// Records are applied in order, so that a signal lies behind the puts it announces. A frame is
// applied whole or not at all: a wrong length, number or checksum is an error that says which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace sluice {

enum class RecordKind : std::uint16_t {
  kPut = 1,      ///< Payload goes to byte `at` of window `object`.
  kSignal = 2,   ///< Flag `flag` of window `object` becomes epoch `at`.
  kPart = 3,     ///< Payload is byte `at` and following of the sender's share of gather `object`.
  kGoodbye = 4,  ///< The sender is at its end: `at` is a Farewell.
};

/// How far a process is in ending. Only a later one follows.
enum class Farewell : std::uint64_t {
  kGoodbye = 1,   ///< It will send nothing more but these.
  kHeardAll = 2,  ///< It has heard the goodbyes of all.
  kLeaves = 3,    ///< It has given up waiting, and leaves without ending MPI.
};

struct Record {
  RecordKind kind = RecordKind::kPut;
  std::uint16_t group = 0;      ///< Which transport of the process.
  std::uint32_t object = 0;     ///< Window or gather, counted by its transport.
  std::uint32_t flag = 0;       ///< kSignal only.
  std::uint32_t num_bytes = 0;  ///< Payload behind this record.
  std::uint64_t at = 0;
  std::uint64_t total = 0;  ///< kPart: bytes of the whole share.
};
static_assert(sizeof(Record) == 32);

struct FrameHeader {
  std::uint32_t magic = 0;
  std::uint32_t num_bytes = 0;  ///< Of the frame, this header included.
  std::uint64_t sequence = 0;
  std::uint64_t checksum = 0;  ///< Of everything behind the header, and of `sequence`.
};
static_assert(sizeof(FrameHeader) == 24);

/// Large enough that headers cost nothing, small enough that the receiver starts early.
inline constexpr std::size_t kFrameBytes = 128 * 1024;

/// A frame under construction in a buffer of kFrameBytes.
class FrameWriter {
 public:
  /// Bytes of payload that still fit behind one more record; 0 if not even a record does.
  [[nodiscard]] std::size_t room() const noexcept;
  [[nodiscard]] bool empty() const noexcept { return bytes_.size() <= sizeof(FrameHeader); }
  /// Requires: payload.size() <= room(), and room for the record.
  void append(Record record, std::span<const std::byte> payload);
  [[nodiscard]] bool fits(std::size_t payload_bytes) const noexcept;
  /// Fills in the header and hands over the bytes; the writer is empty again, using `next`.
  [[nodiscard]] std::vector<std::byte> seal(std::uint64_t sequence, std::vector<std::byte> next);

 private:
  std::vector<std::byte> bytes_ = std::vector<std::byte>(sizeof(FrameHeader));
};

/// What is wrong with `frame`, or empty if nothing is: then every record was passed to `apply`.
[[nodiscard]] std::string read_frame(
    std::span<const std::byte> frame, std::uint64_t expected_sequence,
    const std::function<void(const Record&, std::span<const std::byte>)>& apply);

}  // namespace sluice
