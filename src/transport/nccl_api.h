// nccl_api.h - the few functions of NCCL that the transport uses, as a table.
//
// nccl_library.cc alone includes NCCL's header. It fills the table from the library that it opens,
// so a program built with NCCL runs on machines without it, and a program that has loaded NCCL
// already (PyTorch's, for example) has no second one. Tests fill it with functions of their own.
//
// Functions return NCCL's status codes. Streams are cudaStream_t.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <functional>
#include <string>

namespace sluice {

using NcclId = std::array<std::byte, 128>;  ///< ncclUniqueId
using NcclComm = void*;                     ///< ncclComm_t

inline constexpr int kNcclSuccess = 0;
inline constexpr int kNcclInProgress = 7;
inline constexpr int kNcclTimedOut = -1;  ///< Of NcclApi::gather; none of NCCL's.
/// 2.28.0, as ncclGetVersion() says it.
inline constexpr int kMinNcclVersion = 22'800;

struct NcclApi {
  int version = 0;
  std::string path;     ///< Of the library.
  int num_devices = 0;  ///< CUDA devices that this process sees; 0 without a driver.

  std::function<const char*(int status)> error_string;
  std::function<const char*(NcclComm)> last_error;
  std::function<int(NcclId*)> new_id;
  /// Makes a communicator that does not block, for CUDA device `device`.
  std::function<int(NcclComm*, int num_ranks, const NcclId&, int rank, int device)> init;
  std::function<int(NcclComm, int* status)> async_error;
  std::function<int(NcclComm)> abort;
  std::function<int()> group_start, group_end;
  std::function<int(const void*, std::size_t bytes, int peer, NcclComm, void* stream)> send;
  std::function<int(void*, std::size_t bytes, int peer, NcclComm, void* stream)> receive;

  // Of a communicator that the caller has made.
  std::function<int(NcclComm, int* num_ranks)> count;
  std::function<int(NcclComm, int* rank)> user_rank;
  /// Gathers `bytes` bytes of host memory from every rank into `all`, [ranks, bytes], on a stream
  /// of its own; bytes > 0. kNcclTimedOut: not within the timeout; what is under way then keeps its
  /// memory.
  /// Throws: kCuda, kOutOfMemory.
  std::function<int(NcclComm, const std::byte* mine, std::size_t bytes, std::byte* all,
                    std::chrono::milliseconds timeout)>
      gather;
};

/// The library at `path`; empty: the one that this process has loaded, or else the loader's
/// libnccl.so.2. It is opened once; every later call gives the same.
/// Throws: kUnsupported if there is none, it is too old, another one is open, or this build has no
/// NCCL.
[[nodiscard]] const NcclApi& nccl_library(const std::string& path);

}  // namespace sluice
