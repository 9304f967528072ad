// bench_ggml.cc - both GEMMs of 32 experts by ggml on host cores: the peer of the lines gate_up and
// down of `sluice bench experts --backend cpu`.
//
//   bench_ggml [--threads 2] [--rows 1,4,16,64] [--types q4_0,q4_K] [--buffers REPACK,AMX,CPU]
//
// Each type of weights in each kind of buffer that this build of ggml has and the machine supports:
// as its layers use them, mul_mat_id over one tensor of all experts, and as one mul_mat for each
// expert. Rows are spread evenly. ggml quantizes activations to 8 bits in both products, which is
// part of its time. Outputs are compared with float64 before anything is timed. Times are of 7
// calls, in ms: median, least, and the processor time of one thread in the call that took least of
// it, in which threads that wait for others spin.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr int kExperts = 32, kHidden = 7168, kIntermediate = 2048, kCalls = 7;
constexpr double kMostError = 0.05;  // Of the root of a sum of squares: 8-bit activations.

struct FreeContext {
  void operator()(ggml_context* c) const { ggml_free(c); }
};
struct FreeBuffer {
  void operator()(ggml_backend_buffer_t b) const { ggml_backend_buffer_free(b); }
};
using Context = std::unique_ptr<ggml_context, FreeContext>;
using Buffer = std::unique_ptr<std::remove_pointer_t<ggml_backend_buffer_t>, FreeBuffer>;

Context make_context() {
  return Context(ggml_init({ggml_tensor_overhead() * 400 + ggml_graph_overhead(), nullptr, true}));
}

std::vector<float> random_floats(std::int64_t count) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& x : out) x = normal(random);
  return out;
}

/// A matrix [n, k] whose rows repeat after the first 64.
struct Codes {
  Codes(ggml_type type_in, std::int64_t k_in, std::int64_t n) : type(type_in), k(k_in) {
    constexpr std::int64_t kRows = 64;
    const std::size_t some = ggml_row_size(type, k) * kRows;
    bytes.resize(some * static_cast<std::size_t>(n / kRows));
    ggml_quantize_chunk(type, random_floats(k * kRows).data(), bytes.data(), 0, kRows, k, nullptr);
    for (std::size_t at = some; at < bytes.size(); at += some) {
      std::memcpy(&bytes[at], bytes.data(), some);
    }
  }
  [[nodiscard]] std::vector<float> row(std::int64_t n) const {
    std::vector<float> out(static_cast<std::size_t>(k));
    const std::size_t row_bytes = ggml_row_size(type, k);
    ggml_get_type_traits(type)->to_float(&bytes[static_cast<std::size_t>(n) * row_bytes],
                                         out.data(), k);
    return out;
  }
  ggml_type type;
  std::int64_t k;
  std::vector<char> bytes;
};

/// gate_up [4096, 7168] and down [7168, 2048] of all experts: two tensors, or two for each.
struct Weights {
  Weights(const Codes& gate_up_codes, const Codes& down_codes, ggml_backend_buffer_type_t where,
          bool together_in)
      : together(together_in), context(make_context()) {
    const ggml_type type = gate_up_codes.type;
    for (int e = 0; e < (together ? 1 : kExperts); ++e) {
      const int count = together ? kExperts : 1;
      gate_up.push_back(ggml_new_tensor_3d(context.get(), type, kHidden, 2 * kIntermediate, count));
      down.push_back(ggml_new_tensor_3d(context.get(), type, kIntermediate, kHidden, count));
    }
    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), where));
    if (!buffer) throw std::runtime_error("no memory");
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (ggml_tensor* t : gate_up) fill(t, gate_up_codes);
    for (ggml_tensor* t : down) fill(t, down_codes);
  }
  static void fill(ggml_tensor* t, const Codes& codes) {
    std::vector<char> all(ggml_nbytes(t));  // A buffer that reorders takes a tensor as a whole.
    for (std::size_t at = 0; at < all.size(); at += codes.bytes.size()) {
      std::memcpy(&all[at], codes.bytes.data(), codes.bytes.size());
    }
    ggml_backend_tensor_set(t, all.data(), 0, all.size());
  }
  bool together;
  Context context;
  Buffer buffer;
  std::vector<ggml_tensor*> gate_up, down;
};

/// Both products of `rows` rows for each expert.
class Call {
 public:
  Call(ggml_backend_t backend, const Weights& weights, int rows)
      : backend_(backend), context_(make_context()), graph_(ggml_new_graph(context_.get())) {
    ggml_tensor* ids = nullptr;
    if (weights.together) {
      ids = ggml_new_tensor_2d(context_.get(), GGML_TYPE_I32, 1, std::int64_t{kExperts} * rows);
    }
    for (const auto* matrices : {&weights.gate_up, &weights.down}) {
      for (ggml_tensor* w : *matrices) add(w, ids, rows);
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph_); ++i) {
      is_supported_ &= ggml_backend_supports_op(backend_, ggml_graph_node(graph_, i));
    }
    if (!is_supported_) return;
    buffer_.reset(ggml_backend_alloc_ctx_tensors(context_.get(), backend_));
    for (ggml_tensor* x : inputs_) {
      const std::vector<float> values = random_floats(ggml_nelements(x));
      if (first_.empty()) first_ = values;
      ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
    }
    if (ids == nullptr) return;
    std::vector<std::int32_t> experts(static_cast<std::size_t>(kExperts) *
                                      static_cast<std::size_t>(rows));
    for (std::size_t i = 0; i < experts.size(); ++i) {
      experts[i] = static_cast<std::int32_t>(i) / rows;
    }
    ggml_backend_tensor_set(ids, experts.data(), 0, ggml_nbytes(ids));
  }
  [[nodiscard]] bool is_supported() const { return is_supported_; }

  void run() const {
    if (ggml_backend_graph_compute(backend_, graph_) != GGML_STATUS_SUCCESS) {
      throw std::runtime_error("a graph failed");
    }
  }

  /// 64 outputs of the first row against float64.
  void check(const Codes& codes) const {
    std::vector<float> y(64);
    ggml_backend_tensor_get(ggml_graph_node(graph_, 0), y.data(), 0, y.size() * sizeof(float));
    for (std::size_t n = 0; n < y.size(); ++n) {
      const std::vector<float> w = codes.row(static_cast<std::int64_t>(n));
      double exact = 0, squares = 0;
      for (std::size_t k = 0; k < w.size(); ++k) {
        const double product = static_cast<double>(w[k]) * first_[k];
        exact += product, squares += product * product;
      }
      if (std::fabs(y[n] - exact) <= kMostError * std::sqrt(squares)) continue;
      throw std::runtime_error("output " + std::to_string(n) + " is " + std::to_string(y[n]) +
                               ", not " + std::to_string(exact));
    }
  }

 private:
  void add(ggml_tensor* w, ggml_tensor* ids, int rows) {
    const std::int64_t all = std::int64_t{kExperts} * rows;
    ggml_context* const c = context_.get();
    inputs_.push_back(ids != nullptr ? ggml_new_tensor_3d(c, GGML_TYPE_F32, w->ne[0], 1, all)
                                     : ggml_new_tensor_2d(c, GGML_TYPE_F32, w->ne[0], rows));
    ggml_build_forward_expand(graph_, ids != nullptr ? ggml_mul_mat_id(c, w, inputs_.back(), ids)
                                                     : ggml_mul_mat(c, w, inputs_.back()));
  }

  ggml_backend_t backend_;
  Context context_;
  ggml_cgraph* graph_;
  Buffer buffer_;
  std::vector<ggml_tensor*> inputs_;
  std::vector<float> first_;  ///< Of the inputs.
  bool is_supported_ = true;
};

/// Of all threads so far, in ms.
double processor_ms() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) * 1e-6;
}

void time_call(const Call& call, int rows, int threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> ms;
  double busy = INFINITY;
  for (int i = 0; i < kCalls; ++i) {
    const double busy_start = processor_ms();
    const auto start = Clock::now();
    call.run();
    ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    busy = std::min(busy, processor_ms() - busy_start);
  }
  std::sort(ms.begin(), ms.end());
  std::printf("  %4d rows  %9.2f  %9.2f  %9.2f\n", rows, ms[kCalls / 2], ms[0], busy / threads);
  std::fflush(stdout);
}

ggml_type type_named(const std::string& name) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const char* const known = ggml_type_name(static_cast<ggml_type>(i));
    if (known != nullptr && name == known) return static_cast<ggml_type>(i);
  }
  throw std::runtime_error("ggml has no type '" + name + "'");
}

std::vector<std::string> parts_of(const std::string& list) {
  std::vector<std::string> out;
  std::stringstream in(list);
  for (std::string part; std::getline(in, part, ',');) out.push_back(part);
  return out;
}

/// Of the plain one and those that reorder weights, the ones whose names contain `name`.
std::vector<ggml_backend_buffer_type_t> buffers_named(ggml_backend_t backend,
                                                      const std::string& name) {
  std::vector<ggml_backend_buffer_type_t> all{ggml_backend_cpu_buffer_type()}, out;
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  const auto extra =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  for (auto* b = extra != nullptr ? extra(device) : nullptr; b != nullptr && *b != nullptr; ++b) {
    all.push_back(*b);
  }
  for (ggml_backend_buffer_type_t b : all) {
    const std::string full = ggml_backend_buft_name(b);
    if (name == "CPU" ? full == name : full.find(name) != std::string::npos) out.push_back(b);
  }
  return out;
}

void run(int threads, const std::string& rows, const std::string& types,
         const std::string& buffers) {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_threadpool_params params = ggml_threadpool_params_default(threads);
  ggml_backend_cpu_set_n_threads(backend, threads);
  ggml_backend_cpu_set_threadpool(backend, ggml_threadpool_new(&params));
  std::printf("ggml %s, %d threads; ms: median, least, processor time of a thread\n",
              ggml_version(), threads);
  for (const std::string& name : parts_of(types)) {
    const Codes gate_up(type_named(name), kHidden, 2 * kIntermediate);
    const Codes down(gate_up.type, kIntermediate, kHidden);
    for (const std::string& part : parts_of(buffers)) {
      for (ggml_backend_buffer_type_t where : buffers_named(backend, part)) {
        for (const bool together : {true, false}) {
          const char* const way = together ? "mul_mat_id" : "32 mul_mat";
          std::printf("%s, %s, %s\n", name.c_str(), ggml_backend_buft_name(where), way);
          if (together && part == "AMX") {
            std::printf("  is not there\n");
            continue;
          }
          const Weights weights(gate_up, down, where, together);
          for (const std::string& count : parts_of(rows)) {
            const Call call(backend, weights, std::stoi(count));
            if (!call.is_supported()) {
              std::printf("  is not there\n");
              break;
            }
            call.run();
            call.check(gate_up);
            time_call(call, std::stoi(count), threads);
          }
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::string threads = "2", rows = "1,4,16,64", types = "q4_0,q4_K", buffers = "REPACK,AMX,CPU";
  try {
    for (int i = 1; i < argc; i += 2) {
      const std::string option = argv[i];
      std::string* const to = option == "--threads"   ? &threads
                              : option == "--rows"    ? &rows
                              : option == "--types"   ? &types
                              : option == "--buffers" ? &buffers
                                                      : nullptr;
      if (to == nullptr || i + 1 == argc) throw std::runtime_error("option " + option + "?");
      *to = argv[i + 1];
    }
    run(std::stoi(threads), rows, types, buffers);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_ggml: %s\n", error.what());
    return 1;
  }
  return 0;
}
