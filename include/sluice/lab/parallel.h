// parallel.h - work that several cores share.
#pragma once

#include <cstddef>
#include <functional>

namespace sluice {

/// Runs body(i) for every i in [0, count), on as many threads as there are cores. Which thread
/// takes which i is not determined. Throws what the smallest i threw that failed; the others are
/// not cut short.
void for_each_in_parallel(std::size_t count, const std::function<void(std::size_t)>& body);

/// The same for pieces of up to `size` numbers of [0, count): body(first, end). One piece stays on
/// the calling thread.
void for_pieces_in_parallel(std::size_t count, std::size_t size,
                            const std::function<void(std::size_t, std::size_t)>& body);

}  // namespace sluice
