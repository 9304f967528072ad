// cuda_fixture.h - a test on the first CUDA device, skipped where there is none.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "backend/ops.h"
#include "sluice/error.h"

namespace sluice::testing {

/// Ranks are streams of one process; read by the CUDA runtime before its first call.
inline const bool kEnvironment = [] {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  return true;
}();

/// The device, or null with the reason printed.
inline std::unique_ptr<Backend> cuda_backend() {
  try {
    return make_backend({.device = {Device::Kind::kCuda, 0}});
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kUnsupported) throw;
    std::printf("skipped: %s\n", error.what());
    return nullptr;
  }
}

class CudaBackendTest : public ::testing::Test {
 protected:
  void SetUp() override {
    backend_ = cuda_backend();
    if (!backend_) GTEST_SKIP() << "no CUDA device on this machine";
    ops_ = &ops(*backend_);
    stream_ = backend_->stream();
  }

  template <class T>
  std::unique_ptr<DeviceBuffer> upload(const std::vector<T>& host) {
    auto buffer = backend_->allocate(std::max<std::size_t>(1, host.size() * sizeof(T)));
    if (!host.empty()) {
      backend_->copy_from_host(buffer->data(), host.data(), host.size() * sizeof(T), stream_);
    }
    return buffer;
  }
  template <class T>
  std::vector<T> download(const DeviceBuffer& buffer, std::size_t count) {
    std::vector<T> host(count);
    if (count > 0) backend_->copy_to_host(host.data(), buffer.data(), count * sizeof(T), stream_);
    return host;
  }
  template <class T>
  static T* as(const std::unique_ptr<DeviceBuffer>& buffer) {
    return reinterpret_cast<T*>(buffer->data());
  }
  /// Captures `work` on stream_ and hands back what launches it there. Kernels that load on
  /// their first launch must have been launched before.
  std::function<void()> capture(const std::function<void()>& work) {
    const auto queue = static_cast<cudaStream_t>(stream_.handle);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaStreamBeginCapture(queue, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    work();
    EXPECT_EQ(cudaStreamEndCapture(queue, &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    const std::shared_ptr<void> keep(exec, [](void* e) {
      EXPECT_EQ(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(e)), cudaSuccess);
    });
    return [keep, queue] {
      EXPECT_EQ(cudaGraphLaunch(static_cast<cudaGraphExec_t>(keep.get()), queue), cudaSuccess);
    };
  }

  std::unique_ptr<Backend> backend_;
  BackendOps* ops_ = nullptr;
  Stream stream_;
};

}  // namespace sluice::testing
