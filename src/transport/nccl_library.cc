// NCCL's functions, from the library that is opened at run time. It is not linked: the library
// that a program needs is the one that its framework has loaded, wherever that lies, and a program
// without ranks on several hosts needs none.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>

#include <chrono>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>

#include "core/fail.h"
#include "transport/nccl_api.h"

namespace sluice {
namespace {

static_assert(sizeof(ncclUniqueId) == sizeof(NcclId));
static_assert(ncclSuccess == kNcclSuccess && ncclInProgress == kNcclInProgress);
static_assert(NCCL_VERSION_CODE >= kMinNcclVersion, "NCCL 2.28 or later");

constexpr const char* kSoname = "libnccl.so.2";

/// The function of that name, with the type that the header gives it.
template <class Function>
Function* find(void* library, const char* name, const std::string& path) {
  void* const symbol = dlsym(library, name);
  if (symbol == nullptr) {
    fail(ErrorCode::kUnsupported, "transport 'nccl': the library {} has no function {}", path,
         name);
  }
  return reinterpret_cast<Function*>(symbol);
}
#define SLUICE_NCCL(name) find<decltype(name)>(library, #name, path)

ncclUniqueId native(const NcclId& id) {
  ncclUniqueId copy;
  std::memcpy(&copy, id.data(), sizeof(copy));
  return copy;
}

void* open(const std::string& path) {
  // The one that the process has already, whoever loaded it, and from where.
  void* library = path.empty() ? dlopen(kSoname, RTLD_NOW | RTLD_NOLOAD) : nullptr;
  if (library == nullptr) {
    library = dlopen(path.empty() ? kSoname : path.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) fail(ErrorCode::kUnsupported, "transport 'nccl': {}", dlerror());
  return library;
}

std::string path_of(void* function, const std::string& otherwise) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : otherwise;
}

int count_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  fail(status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kCuda,
       "gathering over the caller's communicator: {}", cudaGetErrorString(status));
}

/// Makes the device of a communicator current, and then the one that was.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda(cudaGetDevice(&before_));
    check_cuda(cudaSetDevice(device));
  }
  ~OnDevice() { (void)cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

/// A stream and device memory of one gather. They are left alone while a kernel may use them.
struct GatherRoom {
  explicit GatherRoom(std::size_t bytes) {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const cudaError_t status = cudaMalloc(&memory, bytes);
    if (status == cudaSuccess) return;
    (void)cudaStreamDestroy(stream);
    check_cuda(status);
  }
  ~GatherRoom() {
    if (is_busy) return;
    (void)cudaFree(memory);
    (void)cudaStreamDestroy(stream);
  }
  GatherRoom(const GatherRoom&) = delete;
  GatherRoom& operator=(const GatherRoom&) = delete;

  cudaStream_t stream = nullptr;
  void* memory = nullptr;
  bool is_busy = false;
};

struct GatherFunctions {
  decltype(&ncclCommCount) count;
  decltype(&ncclCommCuDevice) device;
  decltype(&ncclCommGetAsyncError) async_error;
  decltype(&ncclAllGather) all_gather;
};

int gather(const GatherFunctions& f, ncclComm_t comm, const std::byte* mine, std::size_t bytes,
           std::byte* all, std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  int ranks = 0, device = 0;
  if (const int status = f.count(comm, &ranks); status != ncclSuccess) return status;
  if (const int status = f.device(comm, &device); status != ncclSuccess) return status;
  const OnDevice on_device(device);
  const std::size_t all_bytes = static_cast<std::size_t>(ranks) * bytes;
  GatherRoom room(bytes + all_bytes);
  auto* const from = static_cast<std::byte*>(room.memory) + all_bytes;
  check_cuda(cudaMemcpy(from, mine, bytes, cudaMemcpyHostToDevice));
  room.is_busy = true;
  ncclResult_t status = f.all_gather(from, room.memory, bytes, ncclUint8, comm, room.stream);
  if (status != ncclSuccess && status != ncclInProgress) {
    // Refused at once: the stream knows whether anything was queued before that.
    room.is_busy = cudaStreamQuery(room.stream) != cudaSuccess;
    (void)cudaGetLastError();
    return status;
  }
  // The communicator may be one that does not block.
  while (status == ncclInProgress) {
    if (std::chrono::steady_clock::now() >= deadline) return kNcclTimedOut;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    if (const int asked = f.async_error(comm, &status); asked != ncclSuccess) return asked;
  }
  if (status != ncclSuccess) return status;
  cudaError_t done = cudaStreamQuery(room.stream);
  while (done == cudaErrorNotReady) {
    if (f.async_error(comm, &status) == ncclSuccess && status != ncclSuccess) return status;
    if (std::chrono::steady_clock::now() >= deadline) return kNcclTimedOut;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    done = cudaStreamQuery(room.stream);
  }
  check_cuda(done);
  room.is_busy = false;
  check_cuda(cudaMemcpy(all, room.memory, all_bytes, cudaMemcpyDeviceToHost));
  return ncclSuccess;
}

NcclApi fill(void* library, const std::string& asked) {
  std::string path = asked.empty() ? kSoname : asked;
  NcclApi api;
  const auto get_version = SLUICE_NCCL(ncclGetVersion);
  path = path_of(reinterpret_cast<void*>(get_version), path);
  api.path = path;
  api.num_devices = count_devices();
  if (get_version(&api.version) != ncclSuccess || api.version < kMinNcclVersion) {
    fail(ErrorCode::kUnsupported,
         "transport 'nccl': the library {} has version {}; at least {} (2.28.0) is needed", path,
         api.version, int{kMinNcclVersion});
  }
  api.error_string = [f = SLUICE_NCCL(ncclGetErrorString)](int status) {
    return f(static_cast<ncclResult_t>(status));
  };
  api.last_error = [f = SLUICE_NCCL(ncclGetLastError)](NcclComm comm) {
    return f(static_cast<ncclComm_t>(comm));
  };
  api.new_id = [f = SLUICE_NCCL(ncclGetUniqueId)](NcclId* id) {
    ncclUniqueId made;
    const int status = f(&made);
    std::memcpy(id->data(), &made, sizeof(made));
    return status;
  };
  api.init = [f = SLUICE_NCCL(ncclCommInitRankConfig)](NcclComm* comm, int num_ranks,
                                                       const NcclId& id, int rank, int device) {
    if (cudaSetDevice(device) != cudaSuccess) return static_cast<int>(ncclUnhandledCudaError);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclComm_t made = nullptr;
    const int status = f(&made, num_ranks, native(id), rank, &config);
    *comm = made;
    return status;
  };
  api.async_error = [f = SLUICE_NCCL(ncclCommGetAsyncError)](NcclComm comm, int* status) {
    ncclResult_t result = ncclSuccess;
    const int called = f(static_cast<ncclComm_t>(comm), &result);
    *status = result;
    return called;
  };
  api.abort = [f = SLUICE_NCCL(ncclCommAbort)](NcclComm comm) -> int {
    return f(static_cast<ncclComm_t>(comm));
  };
  api.group_start = [f = SLUICE_NCCL(ncclGroupStart)]() -> int { return f(); };
  api.group_end = [f = SLUICE_NCCL(ncclGroupEnd)]() -> int { return f(); };
  api.send = [f = SLUICE_NCCL(ncclSend)](const void* data, std::size_t bytes, int peer,
                                         NcclComm comm, void* stream) -> int {
    return f(data, bytes, ncclUint8, peer, static_cast<ncclComm_t>(comm),
             static_cast<cudaStream_t>(stream));
  };
  api.receive = [f = SLUICE_NCCL(ncclRecv)](void* data, std::size_t bytes, int peer, NcclComm comm,
                                            void* stream) -> int {
    return f(data, bytes, ncclUint8, peer, static_cast<ncclComm_t>(comm),
             static_cast<cudaStream_t>(stream));
  };
  api.count = [f = SLUICE_NCCL(ncclCommCount)](NcclComm comm, int* num_ranks) -> int {
    return f(static_cast<ncclComm_t>(comm), num_ranks);
  };
  api.user_rank = [f = SLUICE_NCCL(ncclCommUserRank)](NcclComm comm, int* rank) -> int {
    return f(static_cast<ncclComm_t>(comm), rank);
  };
  const GatherFunctions functions{SLUICE_NCCL(ncclCommCount), SLUICE_NCCL(ncclCommCuDevice),
                                  SLUICE_NCCL(ncclCommGetAsyncError), SLUICE_NCCL(ncclAllGather)};
  api.gather = [functions](NcclComm comm, const std::byte* mine, std::size_t bytes, std::byte* all,
                           std::chrono::milliseconds timeout) {
    return gather(functions, static_cast<ncclComm_t>(comm), mine, bytes, all, timeout);
  };
  return api;
}

#undef SLUICE_NCCL

}  // namespace

const NcclApi& nccl_library(const std::string& path) {
  static std::mutex mutex;
  static std::optional<NcclApi> api;
  static std::string opened;
  const std::lock_guard lock(mutex);
  if (!api) {
    api = fill(open(path), path);
    opened = path;
  } else if (!path.empty() && path != opened && path != api->path) {
    fail(ErrorCode::kUnsupported,
         "transport 'nccl': the library {} is asked for, but {} is open already", path, api->path);
  }
  return *api;
}

}  // namespace sluice
