// A graph for each row of kernels that the chain had of late, whatever their parameters.
//
//   work -> KernelList -> parameters that are not those of the last launch -> cudaGraphLaunch
//
// Measured on an H200: three launches take the host 6.8 us, a graph 1.2, setting two small
// parameters 0.7, a large one 1.3. Another kernel in a node's place takes 1 more, so that other
// kernels have a graph of their own; making one takes 37 us and 105 KB of the device. A launch has
// the parameters that were set when it was queued, also if it runs later, and queueing it waits for
// none before.
#include "backend/cuda/kernel_chain.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/apart_from_captures.h"
#include "backend/cuda/capture.h"
#include "backend/cuda/check.h"
#include "backend/cuda/kernel_list.h"

namespace sluice::cuda {
namespace {

/// While it lives, the launches of this thread go to a list.
class Listing {
 public:
  explicit Listing(KernelList& list) : outer_(thread_list) { thread_list = &list; }
  ~Listing() { thread_list = outer_; }
  Listing(const Listing&) = delete;
  Listing& operator=(const Listing&) = delete;

 private:
  KernelList* outer_;
};

/// As launch_early().
void launch(const ListedKernel& k, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = k.blocks;
  config.blockDim = k.threads;
  config.dynamicSmemBytes = k.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* parameters[] = {const_cast<std::byte*>(k.parameter.data())};
  SLUICE_CUDA_CHECK(cudaLaunchKernelExC(&config, k.kernel, parameters));
}

/// The node that a capture on `stream` ends with.
cudaGraphNode_t last_node(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  const cudaGraphNode_t* nodes = nullptr;
  std::size_t num_nodes = 0;
  SLUICE_CUDA_CHECK(
      cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &nodes, nullptr, &num_nodes));
  if (num_nodes != 1) {
    throw Error(ErrorCode::kInternal,
                "a kernel of a chain gave " + std::to_string(num_nodes) + " nodes to follow");
  }
  return nodes[0];
}

class PatchedGraph {
 public:
  /// Of these kernels. `own_stream` is not being captured.
  PatchedGraph(std::span<const ListedKernel> kernels, cudaStream_t own_stream) {
    graph_ = capture_graph(own_stream, cudaStreamCaptureModeRelaxed, [&] {
      for (const ListedKernel& kernel : kernels) {
        launch(kernel, own_stream);
        nodes_.push_back(last_node(own_stream));
        set_.emplace_back().assign(kernel);
      }
    });
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph_, 0);
    if (status == cudaSuccess) return;
    destroy();
    throw_cuda_error(status, "cudaGraphInstantiate");
  }
  ~PatchedGraph() { destroy(); }
  PatchedGraph(const PatchedGraph&) = delete;
  PatchedGraph& operator=(const PatchedGraph&) = delete;

  [[nodiscard]] bool has(std::span<const ListedKernel> kernels) const {
    return std::ranges::equal(kernels, set_, {}, &ListedKernel::kernel, &ListedKernel::kernel);
  }

  /// Requires: has(kernels).
  void launch_with(std::span<ListedKernel> kernels, cudaStream_t stream) {
    for (std::size_t i = 0; i < kernels.size(); ++i) {
      ListedKernel& kernel = kernels[i];
      if (kernel.is_same(set_[i])) continue;
      void* parameters[] = {kernel.parameter.data()};
      cudaKernelNodeParams node{};
      node.func = const_cast<void*>(kernel.kernel);
      node.gridDim = kernel.blocks;
      node.blockDim = kernel.threads;
      node.sharedMemBytes = static_cast<unsigned>(kernel.shared_bytes);
      node.kernelParams = parameters;
      SLUICE_CUDA_CHECK(cudaGraphExecKernelNodeSetParams(exec_, nodes_[i], &node));
      set_[i].assign(kernel);
    }
    SLUICE_CUDA_CHECK(cudaGraphLaunch(exec_, stream));
  }

 private:
  void destroy() noexcept {  // The device may still run it: CUDA waits with freeing it.
    if (exec_ != nullptr) (void)cudaGraphExecDestroy(exec_);
    if (graph_ != nullptr) (void)cudaGraphDestroy(graph_);
  }

  cudaGraph_t graph_ = nullptr;  // Its nodes are names of those in exec_.
  cudaGraphExec_t exec_ = nullptr;
  std::vector<cudaGraphNode_t> nodes_;
  std::vector<ListedKernel> set_;
};

class GraphChain final : public KernelChain {
 public:
  GraphChain(int index, cudaStream_t own_stream) : index_(index), own_stream_(own_stream) {}
  ~GraphChain() override {
    const ApartFromCaptures apart;
    if (cudaSetDevice(index_) == cudaSuccess) graphs_.clear();
  }
  GraphChain(const GraphChain&) = delete;
  GraphChain& operator=(const GraphChain&) = delete;

  void queue(Stream stream, const std::function<void(Stream)>& work) override {
    SLUICE_CUDA_CHECK(cudaSetDevice(index_));
    const auto queue = static_cast<cudaStream_t>(stream.handle);
    if (is_capturing(queue)) {
      work(stream);  // Its kernels overlap with their neighbours; a graph in a graph would not.
      return;
    }
    // One for all chains of a thread, which has one call at a time.
    static thread_local const auto list = std::make_unique<KernelList>();
    list->clear();
    {
      const Listing listing(*list);
      work(stream);
    }
    const std::span<ListedKernel> kernels = list->kernels();
    if (kernels.size() > 1 && find_graph(kernels)) {
      graphs_.front()->launch_with(kernels, queue);
    } else {
      for (const ListedKernel& kernel : kernels) launch(kernel, queue);
    }
  }

 private:
  /// Brings the graph of these kernels to the front, a new one if need be. False while somebody
  /// captures on the backend's own stream.
  [[nodiscard]] bool find_graph(std::span<const ListedKernel> kernels) {
    const auto found = std::ranges::find_if(
        graphs_, [&](const std::unique_ptr<PatchedGraph>& graph) { return graph->has(kernels); });
    if (found != graphs_.end()) {
      std::rotate(graphs_.begin(), found, found + 1);
      return true;
    }
    const ApartFromCaptures apart;
    if (is_capturing(own_stream_)) return false;
    auto graph = std::make_unique<PatchedGraph>(kernels, own_stream_);
    if (graphs_.size() == kMostGraphs) graphs_.pop_back();
    graphs_.insert(graphs_.begin(), std::move(graph));
    return true;
  }

  static constexpr std::size_t kMostGraphs = 4;  // Few and many rows, tokens and batches.

  int index_;
  cudaStream_t own_stream_;
  std::vector<std::unique_ptr<PatchedGraph>> graphs_;  // The last one used is the first.
};

}  // namespace

std::unique_ptr<KernelChain> make_kernel_chain(int index, void* own_stream) {
  return std::make_unique<GraphChain>(index, static_cast<cudaStream_t>(own_stream));
}

bool is_in_chain() noexcept {
  return thread_list != nullptr;
}

void refuse_in_chain(const char* what) {
  if (!is_in_chain()) return;
  throw Error(ErrorCode::kInternal,
              std::string(what) + " in a chain of kernels would be queued before them");
}

}  // namespace sluice::cuda
