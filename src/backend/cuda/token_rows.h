// token_rows.h - host side of the kernels around the experts of a local call.
//
//   x [T, H] --[gather_tokens: rows, casts]--> rows --experts--> rows --[sum_entries]--> y [T, H]
//
// Plain C++, as w4a8.h: asynchronous on the stream, no allocation, no host synchronization,
// capturable. Grids depend on the number of tokens alone.
#pragma once

#include "backend/cuda/w4a8.h"
#include "backend/rows.h"

namespace sluice::cuda {

inline constexpr int kMaxTokenExperts = 1024;

/// As BackendOps::gather_tokens().
struct GatherTokens {
  TokenRows tokens;   ///< x and codes 16 B aligned, stride a multiple of 16 B.
  EntryRows entries;  ///< At most kMaxTokenExperts experts and 32 top-k entries.
  Fp8Rows out;        ///< codes 16 B aligned, stride a multiple of 16 B.
};
void launch_gather_tokens(const GatherTokens& args, int num_sms, StreamHandle stream);

/// As BackendOps::sum_entries(). rows and y are 16 B aligned.
void launch_sum_entries(const EntrySums& args, StreamHandle stream);

/// Set what these kernels' launches rely on, on the current device; once is enough.
void prepare_gather_kernels();
void prepare_sum_kernel();

}  // namespace sluice::cuda
