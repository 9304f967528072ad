#include "backend/cpu/memory_nodes.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <string>
#include <string_view>

#include "backend/cpu/page_buffer.h"

namespace sluice::cpu {
namespace {

/// "0-3,8" -> 0 1 2 3 8; empty if it is anything else.
std::vector<int> parse_list(std::string_view text) {
  std::vector<int> out;
  while (!text.empty() && text.back() == '\n') text.remove_suffix(1);
  while (!text.empty()) {
    const std::string_view part = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), part.size() + 1));
    int first = 0, last = 0;
    const char* const end = part.data() + part.size();
    auto [next, error] = std::from_chars(part.data(), end, first);
    if (error != std::errc{}) return {};
    last = first;
    if (next != end) {
      if (*next != '-' || std::from_chars(next + 1, end, last).ec != std::errc{}) return {};
    }
    if (first < 0 || last < first || last > 1 << 20) return {};
    for (int i = first; i <= last; ++i) out.push_back(i);
  }
  return out;
}

/// The node of every core that some node has.
std::map<int, int> nodes_of_cores(const std::filesystem::path& root) {
  std::map<int, int> out;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(root, error)) {
    const std::string name = entry.path().filename().string();
    int node = 0;
    if (!name.starts_with("node") ||
        std::from_chars(name.data() + 4, name.data() + name.size(), node).ec != std::errc{}) {
      continue;
    }
    std::ifstream file(entry.path() / "cpulist");
    std::string text;
    if (!std::getline(file, text)) continue;  // A node of memory alone.
    for (const int core : parse_list(text)) out[core] = node;
  }
  return out;
}

/// set_mempolicy(2): from this node while it has free memory, from others then.
constexpr long kPreferred = 1;

void prefer_node(std::byte* memory, std::size_t bytes, int node) {
#if defined(SYS_mbind)
  constexpr int kMaxNodes = 1024;
  unsigned long mask[kMaxNodes / (8 * sizeof(unsigned long))] = {};
  constexpr int kBits = 8 * sizeof(unsigned long);
  if (bytes == 0 || node >= kMaxNodes) return;
  mask[node / kBits] = 1ul << (node % kBits);
  (void)syscall(SYS_mbind, memory, bytes, kPreferred, mask, kMaxNodes + 1, 0);
#else
  (void)memory, (void)bytes, (void)node, (void)kPreferred;
#endif
}

}  // namespace

MemoryNodes::MemoryNodes(int num_threads)
    : ids_{0},
      of_thread_(static_cast<std::size_t>(num_threads), 0),
      first_thread_{0, num_threads} {}

MemoryNodes::MemoryNodes(const std::vector<int>& cores, int num_threads,
                         const std::filesystem::path& root)
    : MemoryNodes(num_threads) {
  const std::map<int, int> nodes = nodes_of_cores(root);
  has_several_ = std::ranges::any_of(
      nodes, [&](const auto& core_node) { return core_node.second != nodes.begin()->second; });
  if (!has_several_) return;
  std::vector<int> node_of_thread;
  for (int t = 0; t < num_threads; ++t) {
    const auto found = nodes.find(cores[static_cast<std::size_t>(t) % cores.size()]);
    node_of_thread.push_back(found == nodes.end() ? nodes.begin()->second : found->second);
  }
  ids_ = node_of_thread;
  std::ranges::sort(ids_);
  ids_.erase(std::unique(ids_.begin(), ids_.end()), ids_.end());
  first_thread_.assign(ids_.size() + 1, 0);
  for (std::size_t t = 0; t < node_of_thread.size(); ++t) {
    const auto index = std::ranges::find(ids_, node_of_thread[t]) - ids_.begin();
    of_thread_[t] = static_cast<int>(index);
    for (std::size_t i = static_cast<std::size_t>(index) + 1; i < first_thread_.size(); ++i) {
      ++first_thread_[i];
    }
  }
}

MemoryNodes::Share MemoryNodes::share(int node, std::int64_t n) const {
  const auto i = static_cast<std::size_t>(node);
  const std::int64_t threads = first_thread_.back();
  return {n * first_thread_[i] / threads, n * first_thread_[i + 1] / threads};
}

void MemoryNodes::place(std::byte* memory, std::size_t bytes, std::int64_t n) const {
  if (!has_several_ || bytes == 0) return;
  const auto slice = static_cast<std::int64_t>(bytes) / n;
  const auto page = [](std::int64_t at) {
    return static_cast<std::size_t>(at) / kPageBytes * kPageBytes;
  };
  for (int node = 0; node < count(); ++node) {
    const Share part = share(node, n);
    const std::size_t first = page(part.first * slice);
    const std::size_t last = node + 1 == count() ? bytes : page(part.last * slice);
    prefer_node(memory + first, last - first, ids_[static_cast<std::size_t>(node)]);
  }
}

}  // namespace sluice::cpu
