// repack_kernel.h - from rows of codes to the lines that the CPU kernels read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice::cpu {

/// Words [0, num_words) of 16 rows, the first of row `lane` at rows + lane * row_bytes, become
/// num_words lines of 64 bytes: word w of row `lane`, with `flip` exclusive-ored, is word `lane` of
/// line w. A word is four bytes, 8 k of a row. num_words is a multiple of 4.
void transpose_words(const std::byte* rows, std::int64_t row_bytes, std::int64_t num_words,
                     std::uint32_t flip, std::uint8_t* lines);

}  // namespace sluice::cpu
