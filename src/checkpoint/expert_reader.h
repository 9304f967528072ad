// expert_reader.h - experts of one layer, one matrix at a time, into memory that the caller brings.
//
//   file --read()--> slot: [codes][scales][small parts][copies that the format needs]
//                      ^ views of the QuantMatrix that read() returns point in here
//
// Checkpoint::load_experts() maps the files instead and gives all experts at once. The values are
// the same, and so are the refusals.
//
// Threads: read() from any number at once, with a slot each.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "checkpoint/formats/nibbles.h"
#include "checkpoint/formats/part_readers.h"
#include "sluice/checkpoint.h"

namespace sluice {

struct CheckpointData;

class ExpertReader {
 public:
  /// Checks headers and reads the layer's static scales. Borrows `checkpoint`.
  /// Throws: as Checkpoint::load_experts(), for everything that headers show.
  ExpertReader(const Checkpoint& checkpoint, int layer, int first_expert, int num_experts);

  /// What load_experts() gives, without data: shapes and dtypes of every view, and no bytes.
  [[nodiscard]] const ExpertWeights& shapes() const noexcept { return shapes_; }
  /// Bytes that a slot needs: of the matrix that takes most.
  [[nodiscard]] std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  /// Bytes of all tensors of all these experts, as they lie in the files.
  [[nodiscard]] std::uint64_t file_bytes() const noexcept { return file_bytes_; }
  /// Bytes that read() has read so far.
  [[nodiscard]] std::uint64_t bytes_read() const noexcept { return bytes_read_; }

  /// Reads and checks one matrix of expert `index`, which counts from 0. Its views point into
  /// `slot`, slot_bytes() long and aligned to 256 bytes. An expert's nibbles are judged with the
  /// last of its three matrices.
  /// Throws: as load_experts(); kCorruptFile naming file and tensor if the file has been cut.
  [[nodiscard]] QuantMatrix read(int index, MatrixRole role, std::span<std::byte> slot);

  /// The tensors of one matrix as they lie in their files, for who wants to read just them.
  [[nodiscard]] std::vector<TensorRef> tensors(int index, MatrixRole role) const;

 private:
  /// What the matrices of one expert that were read so far have shown.
  struct Seen {
    NibbleEvidence nibbles;
    int num_matrices = 0;
  };

  [[nodiscard]] const ExpertTensors& expert(int index) const;
  void judge(int index, const QuantMatrix& matrix);

  const CheckpointData* data_;
  std::array<MatrixLayout, 3> layouts_;
  std::array<std::vector<std::string>, 3> parts_;  ///< Of each matrix: names, by MatrixRole.
  ExpertWeights shapes_;
  std::size_t slot_bytes_ = 0;
  std::uint64_t file_bytes_ = 0;
  std::atomic<std::uint64_t> bytes_read_{0};
  std::mutex mutex_;
  std::vector<Seen> seen_;  ///< [num_experts], under mutex_.
};

}  // namespace sluice
