// expert_reader.h - experts of one layer, a piece of a matrix at a time, into a caller's memory.
//
//   file --read_scales()--> scales, checked, and what the format has beside them
//        --read_rows()----> canonical codes of some rows
//
// Pieces are small enough to stay in a core's cache until somebody has taken them. Whole matrices
// would go to main memory and back. Checkpoint::load_experts() maps the files instead and gives all
// experts at once. The values are the same, and so are the refusals.
//
// Threads: any number at once, with memory of their own.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/formats/nibbles.h"
#include "checkpoint/formats/part_readers.h"
#include "sluice/checkpoint.h"

namespace sluice {

struct CheckpointData;

class ExpertReader {
 public:
  static constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

  /// Checks headers and reads the layer's static scales. Borrows `checkpoint`. Pieces of a matrix
  /// are about as large as each other, and no larger than `piece_bytes` where 16 rows are not.
  /// Throws: as Checkpoint::load_experts(), for everything that headers show.
  ExpertReader(const Checkpoint& checkpoint, int layer, int first_expert, int num_experts,
               std::size_t piece_bytes = kPieceBytes);
  /// The same of experts with any numbers, also repeated; shapes().first_expert is the first one's.
  ExpertReader(const Checkpoint& checkpoint, int layer, std::vector<int> experts,
               std::size_t piece_bytes = kPieceBytes);

  /// What load_experts() gives, without data: shapes and dtypes of every view, and no bytes.
  [[nodiscard]] const ExpertWeights& shapes() const noexcept { return shapes_; }
  /// Bytes that read_scales() needs, of the matrix that takes most.
  [[nodiscard]] std::size_t scales_bytes() const noexcept { return scales_bytes_; }
  /// Bytes of the codes of the largest piece, and of the largest matrix.
  [[nodiscard]] std::size_t piece_bytes() const noexcept { return piece_bytes_; }
  [[nodiscard]] std::size_t codes_bytes() const noexcept { return codes_bytes_; }
  /// Rows of a piece of such a matrix: a multiple of 16. The last piece may have fewer.
  [[nodiscard]] std::int64_t piece_rows(MatrixRole role) const noexcept;
  /// Bytes of all tensors of all these experts, as they lie in the files. Where gate and up lie row
  /// by row in one tensor (gpt-oss), it is read for each of them and counts twice.
  [[nodiscard]] std::uint64_t file_bytes() const noexcept { return file_bytes_; }
  /// Bytes that were read so far.
  [[nodiscard]] std::uint64_t bytes_read() const noexcept { return bytes_read_; }

  /// Reads and checks everything but the codes of one matrix of expert `index`, which counts from
  /// 0. The scales lie in `memory`, scales_bytes() long and aligned to 256 bytes.
  /// Throws: as load_experts(); kCorruptFile naming file and tensor if the file has been cut.
  [[nodiscard]] TensorView read_scales(int index, MatrixRole role, std::span<std::byte> memory);
  /// Reads the codes of as many rows as `rows` has room for, from `first_row` on, and makes them
  /// canonical. `spare` is as large. An expert's nibbles are judged with the first rows of the last
  /// of its three matrices.   Throws: the same.
  void read_rows(int index, MatrixRole role, std::int64_t first_row, std::span<std::byte> rows,
                 std::span<std::byte> spare);

  /// [N] float32, padded like the shapes; empty where experts have none. Throws: the same.
  [[nodiscard]] std::vector<float> read_bias(int index, MatrixRole role);

  /// The tensors of one matrix as they lie in their files, for who wants to read just them.
  [[nodiscard]] std::vector<TensorRef> tensors(int index, MatrixRole role) const;

 private:
  /// What the matrices of one expert that were read so far have shown.
  struct Seen {
    NibbleEvidence nibbles;
    int num_matrices = 0;
  };

  [[nodiscard]] const ExpertTensors& expert(int index) const;
  [[nodiscard]] std::int64_t row_bytes(std::size_t matrix) const noexcept;
  [[nodiscard]] bool is_beside(const std::string& part, std::size_t matrix) const;
  void read_scattered_rows(int index, std::size_t matrix, std::int64_t first_row,
                           std::span<std::byte> rows, std::span<std::byte> spare);
  void read(const TensorRef& tensor, std::uint64_t at, std::span<std::byte> bytes);
  void judge(int index, const QuantMatrix& rows);

  const CheckpointData* data_;
  std::vector<int> experts_;
  std::array<MatrixLayout, 3> layouts_;
  std::array<std::vector<std::string>, 3> parts_;  ///< Of each matrix: names, by MatrixRole.
  std::array<std::string, 3> codes_parts_;         ///< Which of them has the codes.
  ExpertWeights shapes_;
  std::size_t most_piece_bytes_;
  std::size_t scales_bytes_ = 0, piece_bytes_ = 0, codes_bytes_ = 0;
  std::uint64_t file_bytes_ = 0;
  std::atomic<std::uint64_t> bytes_read_{0};
  std::mutex mutex_;
  std::vector<Seen> seen_;  ///< [num_experts], under mutex_.
};

}  // namespace sluice
