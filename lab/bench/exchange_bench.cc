// Dispatch and combine by themselves: every byte checked against the definition, then timed without
// any host synchronization between operations.
#include "sluice/lab/exchange_bench.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "backend/ops.h"
#include "core/counter_rng.h"
#include "core/fail.h"
#include "exchange/placement.h"
#include "sluice/lab/ranks.h"
#include "sluice/quant.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

constexpr std::chrono::milliseconds kSetUpTimeout{60'000};

/// Tokens and routing of every rank, and the bytes that each token is on the wire.
struct Traffic {
  ExchangeConfig config;
  float static_scale = 0;
  int num_ranks = 1;
  std::int64_t tokens = 0;  // Of each rank.
  std::size_t row_bytes = 0, payload_bytes = 0;
  std::vector<std::uint16_t> x = {};        // [num_ranks * tokens, hidden]
  std::vector<std::int32_t> topk_idx = {};  // [num_ranks * tokens, num_topk]
  std::vector<float> weights = {};
  std::vector<std::byte> wire = {};  // [num_ranks * tokens, row_bytes]: payload, then scales

  [[nodiscard]] std::size_t slots_of_rank() const {
    return static_cast<std::size_t>(tokens) * static_cast<std::size_t>(config.num_topk);
  }
};

/// Rank r's part of x and wire. Values only have to tell tokens and channels apart.
void fill_tokens(Traffic& t, int r, std::uint64_t seed) {
  const auto hidden = static_cast<std::size_t>(t.config.hidden);
  const auto first = static_cast<std::size_t>(r) * static_cast<std::size_t>(t.tokens);
  std::vector<float> values(hidden);
  std::vector<std::uint8_t> codes(hidden);
  for (std::size_t i = first; i < first + static_cast<std::size_t>(t.tokens); ++i) {
    for (std::size_t c = 0; c < hidden; ++c) {
      const std::uint64_t bits = mix64(seed ^ ((i * hidden + c) * 0x9e3779b97f4a7c15u));
      const float unit = static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f;
      t.x[i * hidden + c] = bf16_from_float(unit * static_cast<float>(1 << (bits & 3)));
      values[c] = bf16_to_float(t.x[i * hidden + c]);
    }
    std::byte* const row = &t.wire[i * t.row_bytes];
    if (t.config.wire == WireFormat::kBf16) {
      std::memcpy(row, &t.x[i * hidden], t.row_bytes);
      continue;
    }
    if (t.config.wire == WireFormat::kE4m3Static) {
      quantize_static(values, t.static_scale, codes);
    }
    for (std::size_t g = 0; g < hidden && t.row_bytes > t.payload_bytes; g += kActivationGroup) {
      const std::span in(values.data() + g, kActivationGroup);
      const std::span out(codes.data() + g, kActivationGroup);
      const float scale = t.config.wire == WireFormat::kE4m3Pow2 ? quantize_group_pow2(in, out)
                                                                 : quantize_group(in, out);
      std::memcpy(row + t.payload_bytes + g / kActivationGroup * sizeof(float), &scale,
                  sizeof(scale));
    }
    std::memcpy(row, codes.data(), codes.size());
  }
}

Traffic make_traffic(const ExchangeBenchConfig& bench, const ExchangeConfig& config, int tokens,
                     bool all_gather) {
  Traffic t{.config = config,
            .static_scale = bench.static_scale,
            .num_ranks = bench.num_ranks,
            .tokens = tokens};
  t.row_bytes = wire_bytes_per_token(config.wire, config.hidden);
  t.payload_bytes =
      static_cast<std::size_t>(config.hidden) * (config.wire == WireFormat::kBf16 ? 2u : 1u);
  const auto all = static_cast<std::size_t>(tokens) * static_cast<std::size_t>(bench.num_ranks);
  t.x.resize(all * static_cast<std::size_t>(config.hidden));
  t.wire.resize(all * t.row_bytes);
  on_every_rank(bench.num_ranks, [&](int r) { fill_tokens(t, r, bench.seed); });
  if (all_gather) {
    for (std::size_t i = 0; i < all * static_cast<std::size_t>(config.num_topk); ++i) {
      t.topk_idx.push_back(
          static_cast<std::int32_t>(i % static_cast<std::size_t>(bench.num_ranks)));
      t.weights.push_back(1.0f);
    }
    return t;
  }
  // Routing of the ordinary workload, without its values.
  Workload load = make_workload({.num_experts = config.num_experts,
                                 .num_topk = config.num_topk,
                                 .hidden = kActivationGroup,
                                 .routing = bench.routing,
                                 .seed = bench.seed},
                                0, static_cast<std::int64_t>(all));
  t.topk_idx = std::move(load.topk_idx);
  t.weights = std::move(load.topk_weights);
  return t;
}

/// What expert `e` makes of channel `c` of a token: cheap, and different for all three.
float expert_value(std::int32_t e, std::size_t token, std::size_t c) {
  const auto mixed = static_cast<std::uint32_t>(e) * 0x9e3779b9u +
                     static_cast<std::uint32_t>(token) * 0x85ebca6bu +
                     static_cast<std::uint32_t>(c) * 0xc2b2ae35u;
  return static_cast<float>(static_cast<std::int32_t>(mixed ^ (mixed >> 15))) * 0x1p-31f;
}

/// One rank: its tensors and its exchange.
class BenchRank {
 public:
  BenchRank(const Traffic& traffic, Transport& transport, BackendOps& backend)
      : traffic_(traffic), transport_(transport), backend_(backend), rank_(transport.rank()) {
    const auto r = static_cast<std::size_t>(rank_);
    const std::size_t hidden = static_cast<std::size_t>(traffic.config.hidden);
    const std::size_t elements = static_cast<std::size_t>(traffic.tokens) * hidden;
    x_ = upload(&traffic.x[r * elements], elements * 2);
    idx_ = upload(&traffic.topk_idx[r * traffic.slots_of_rank()], traffic.slots_of_rank() * 4);
    weights_ = upload(&traffic.weights[r * traffic.slots_of_rank()], traffic.slots_of_rank() * 4);
    y_ = backend.allocate(std::max<std::size_t>(1, elements * 2));
    exchange_ = std::make_unique<Exchange>(
        Exchange::create(traffic.config, transport, static_cast<Backend&>(backend)));
    const std::size_t rows = static_cast<std::size_t>(exchange_->max_rows());
    if (backend.device().kind == Device::Kind::kHost) rows_ = backend.allocate(rows * hidden * 2);
    barrier();
  }

  void barrier() { (void)transport_.all_gather({}, kSetUpTimeout); }
  [[nodiscard]] Exchange& exchange() { return *exchange_; }

  [[nodiscard]] Dispatched dispatch() {
    const Device device = backend_.device();
    const auto& c = traffic_.config;
    const Shape slots{traffic_.tokens, c.num_topk};
    return exchange_->dispatch(
        {x_->data(), DType::kBFloat16, Shape{traffic_.tokens, c.hidden}, device},
        {.topk_idx = {idx_->data(), DType::kInt32, slots, device},
         .topk_weights = {weights_->data(), DType::kFloat32, slots, device}},
        backend_.stream(), traffic_.static_scale);
  }
  void combine(Dispatched d) {
    const MutableTensorView rows = rows_of(d);
    MutableTensorView y;
    y.data = y_->data(), y.dtype = DType::kBFloat16, y.device = backend_.device();
    y.shape = Shape{traffic_.tokens, traffic_.config.hidden};
    exchange_->combine(std::move(d), rows, y, backend_.stream());
  }

  /// One pair, every byte compared; returns how many elements were.
  std::int64_t check() {
    Dispatched d = dispatch();
    std::int64_t checked = check_rows(d);
    combine(std::move(d));
    checked += check_sums();
    exchange_->check();
    return checked;
  }

  [[nodiscard]] std::unique_ptr<Recording> record(int pairs, bool mark_operations) {
    auto recording = backend_.record(
        backend_.stream(), [this, pairs, mark_operations](const std::function<void()>& mark) {
          mark();
          for (int i = 0; i < pairs; ++i) {
            Dispatched d = dispatch();
            if (mark_operations) mark();
            combine(std::move(d));
            if (mark_operations) mark();
          }
          if (!mark_operations) mark();
        });
    barrier();
    return recording;
  }

 private:
  [[nodiscard]] std::unique_ptr<DeviceBuffer> upload(const void* host, std::size_t bytes) {
    auto buffer = backend_.allocate(std::max<std::size_t>(1, bytes));
    backend_.copy_from_host(buffer->data(), host, bytes, backend_.stream());
    return buffer;
  }
  [[nodiscard]] MutableTensorView rows_of(const Dispatched& d) const {
    MutableTensorView rows = d.expert_y();
    if (!rows.empty()) return rows;
    rows.data = rows_->data(), rows.dtype = DType::kBFloat16;
    rows.shape = d.batch().x.shape, rows.device = backend_.device();
    return rows;
  }
  std::int64_t check_rows(const Dispatched& d);
  std::int64_t check_sums();

  const Traffic& traffic_;
  Transport& transport_;
  BackendOps& backend_;
  int rank_;
  std::unique_ptr<DeviceBuffer> x_, idx_, weights_, y_, rows_;
  std::unique_ptr<Exchange> exchange_;
};

std::int64_t BenchRank::check_rows(const Dispatched& d) {
  const ExpertBatch& batch = d.batch();
  const Stream stream = backend_.stream();
  const ExpertPlacement placement(traffic_.config.num_experts, transport_.num_ranks());
  const auto num_local = static_cast<std::size_t>(placement.num_local());
  const auto hidden = static_cast<std::size_t>(traffic_.config.hidden);
  const auto topk = static_cast<std::size_t>(traffic_.config.num_topk);
  std::vector<std::vector<std::size_t>> tokens(num_local);  // Of each expert, in order.
  for (std::size_t i = 0; i < traffic_.topk_idx.size(); ++i) {
    const std::int32_t e = traffic_.topk_idx[i];
    if (e < 0 || placement.rank_of(e) != rank_) continue;
    tokens[static_cast<std::size_t>(placement.local_of(e))].push_back(i / topk);
  }
  std::vector<std::int32_t> num_rows(num_local);
  std::vector<std::int64_t> row_begin(num_local);
  backend_.copy_to_host(num_rows.data(), batch.num_rows.data, num_local * 4, stream);
  backend_.copy_to_host(row_begin.data(), batch.row_begin.data, num_local * 8, stream);
  const std::size_t payload = traffic_.payload_bytes, scales = traffic_.row_bytes - payload;
  const MutableTensorView out = rows_of(d);
  std::vector<std::byte> have_payload, have_scales;
  std::vector<std::uint16_t> y;
  std::int64_t checked = 0;
  for (std::size_t e = 0; e < num_local; ++e) {
    const std::size_t n = tokens[e].size();
    if (num_rows[e] != static_cast<std::int32_t>(n)) {
      fail(ErrorCode::kInternal, "rank {}: expert {} received {} rows, expected {}", rank_, e,
           num_rows[e], n);
    }
    if (n == 0) continue;
    const auto begin = static_cast<std::size_t>(row_begin[e]);
    have_payload.resize(n * payload), have_scales.resize(n * scales), y.resize(n * hidden);
    backend_.copy_to_host(have_payload.data(), batch.x.as<std::byte>() + begin * payload,
                          have_payload.size(), stream);
    if (scales > 0) {
      backend_.copy_to_host(have_scales.data(), batch.x_scale.as<std::byte>() + begin * scales,
                            have_scales.size(), stream);
    }
    const std::int32_t expert = placement.expert_of(rank_, static_cast<int>(e));
    for (std::size_t i = 0; i < n; ++i) {
      const std::byte* const want = &traffic_.wire[tokens[e][i] * traffic_.row_bytes];
      if (std::memcmp(&have_payload[i * payload], want, payload) != 0 ||
          (scales > 0 && std::memcmp(&have_scales[i * scales], want + payload, scales) != 0)) {
        fail(ErrorCode::kInternal, "rank {}: row {} of expert {} is not token {}", rank_, i, e,
             tokens[e][i]);
      }
      for (std::size_t c = 0; c < hidden; ++c) {
        y[i * hidden + c] = bf16_from_float(expert_value(expert, tokens[e][i], c));
      }
    }
    backend_.copy_from_host(out.as<std::uint16_t>() + begin * hidden, y.data(), y.size() * 2,
                            stream);
    checked += static_cast<std::int64_t>(n * hidden);
  }
  return checked;
}

std::int64_t BenchRank::check_sums() {
  const auto hidden = static_cast<std::size_t>(traffic_.config.hidden);
  const auto topk = static_cast<std::size_t>(traffic_.config.num_topk);
  const auto tokens = static_cast<std::size_t>(traffic_.tokens);
  const std::size_t first = static_cast<std::size_t>(rank_) * tokens;
  std::vector<std::uint16_t> y(tokens * hidden);
  backend_.copy_to_host(y.data(), y_->data(), y.size() * 2, backend_.stream());
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::int32_t* const idx = &traffic_.topk_idx[(first + t) * topk];
    const float* const weight = &traffic_.weights[(first + t) * topk];
    for (std::size_t c = 0; c < hidden; ++c) {
      float sum = 0;
      for (std::size_t k = 0; k < topk; ++k) {
        if (idx[k] < 0) continue;
        const float product =
            weight[k] * bf16_to_float(bf16_from_float(expert_value(idx[k], first + t, c)));
        sum = sum + product;
      }
      const std::uint16_t want = bf16_from_float(sum * traffic_.config.routed_scaling_factor);
      if (y[t * hidden + c] != want) {
        fail(ErrorCode::kInternal, "rank {}: token {} element {} is {}, expected {}", rank_, t, c,
             bf16_to_float(y[t * hidden + c]), bf16_to_float(want));
      }
    }
  }
  return static_cast<std::int64_t>(y.size());
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values.empty() ? 0 : values[values.size() / 2];
}

/// The largest of what the ranks measured, entry by entry.
void keep_slowest(Transport& transport, std::vector<double>& mine) {
  const auto all = transport.all_gather(std::as_bytes(std::span(mine)), kSetUpTimeout);
  for (const auto& bytes : all) {
    const auto* theirs = reinterpret_cast<const double*>(bytes.data());
    for (std::size_t i = 0; i < mine.size(); ++i) mine[i] = std::max(mine[i], theirs[i]);
  }
}

/// Microseconds between two time stamps with nothing between.
double stamp_cost(BackendOps& backend) {
  const auto recording = backend.record(backend.stream(), [](const std::function<void()>& mark) {
    for (int i = 0; i < 20; ++i) mark();
  });
  recording->replay();
  (void)recording->marks_us();
  recording->replay();
  return median(recording->marks_us());
}

struct CaseResult {
  ExchangeBenchTimes times;
  std::int64_t checked = 0, rows = 0;
};

CaseResult run_case(const ExchangeBenchConfig& bench, const ExchangeConfig& config, int tokens,
                    bool all_gather) {
  const Traffic traffic = make_traffic(bench, config, tokens, all_gather);
  CaseResult result;
  result.rows = static_cast<std::int64_t>(
      std::ranges::count_if(traffic.topk_idx, [](std::int32_t e) { return e >= 0; }));
  std::vector<std::int64_t> checked(static_cast<std::size_t>(bench.num_ranks));
  std::vector<ExchangeCounters> counters(checked.size());
  auto transports = make_inproc_transports(bench.num_ranks);
  on_every_rank(bench.num_ranks, [&](int r) {
    const auto i = static_cast<std::size_t>(r);
    Transport& transport = *transports[i];
    const auto backend =
        make_backend(place_rank(bench.device, r, bench.num_ranks, bench.num_devices));
    BenchRank rank(traffic, transport, ops(*backend));
    const ExchangeCounters before = rank.exchange().counters();
    checked[i] = rank.check();
    counters[i] = rank.exchange().counters();
    for (std::size_t p = 0; p < counters[i].dispatch_bytes.size(); ++p) {
      counters[i].dispatch_bytes[p] -= before.dispatch_bytes[p];
      counters[i].combine_bytes[p] -= before.combine_bytes[p];
    }
    rank.barrier();
    const double stamp = stamp_cost(ops(*backend));
    rank.barrier();
    const auto free_running = rank.record(bench.pairs, false);
    const auto stamped = rank.record(bench.pairs, true);
    std::vector<double> pair, dispatch, combine;
    for (int repeat = -1; repeat < bench.repeats; ++repeat) {
      rank.barrier();
      free_running->replay();
      std::vector<double> us = free_running->marks_us();
      keep_slowest(transport, us);
      if (repeat >= 0) pair.push_back(us.at(0) / bench.pairs);
    }
    for (int repeat = -1; repeat < bench.repeats; ++repeat) {
      rank.barrier();
      stamped->replay();
      std::vector<double> us = stamped->marks_us();
      keep_slowest(transport, us);
      // The first pair also waits for ranks that were launched later.
      for (std::size_t m = 2; repeat >= 0 && m + 1 < us.size(); m += 2) {
        dispatch.push_back(us[m] - stamp), combine.push_back(us[m + 1] - stamp);
      }
    }
    rank.exchange().check();
    if (r == 0) {
      result.times.pair_us = median(pair);
      result.times.dispatch_us = median(dispatch);
      result.times.combine_us = median(combine);
    }
    rank.barrier();
  });
  double off_rank = 0;
  for (std::size_t r = 0; r < counters.size(); ++r) {
    result.checked += checked[r];
    for (std::size_t p = 0; p < counters.size(); ++p) {
      const auto out = static_cast<double>(counters[r].dispatch_bytes[p]);
      const auto home = static_cast<double>(counters[r].combine_bytes[p]);
      result.times.dispatch_bytes += out;
      result.times.combine_bytes += home;
      if (p != r) off_rank += out + home;
    }
  }
  const double bytes = result.times.dispatch_bytes + result.times.combine_bytes;
  result.times.off_rank_share = bytes > 0 ? off_rank / bytes : 0;
  return result;
}

/// Bytes per second that a copy from the device of `source` brings to that of `backend`, measured
/// now.
double measure_copy(BackendOps& backend, BackendOps& source) {
  const std::size_t bytes = backend.device().kind == Device::Kind::kHost ? 64u << 20 : 1u << 30;
  const auto from = source.allocate(bytes), to = backend.allocate(bytes);
  const Stream stream = backend.stream();
  backend.copy_on_device(to->data(), from->data(), bytes, stream);
  backend.synchronize(stream);
  const auto recording = backend.record(stream, [&](const std::function<void()>& mark) {
    mark();
    backend.copy_on_device(to->data(), from->data(), bytes, stream);
    mark();
  });
  std::vector<double> us;
  for (int i = 0; i < 7; ++i) {
    recording->replay();
    us.push_back(recording->marks_us().at(0));
  }
  return static_cast<double>(bytes) / median(us) * 1e6;
}

}  // namespace

ExchangeBenchReport bench_exchange(const ExchangeBenchConfig& bench,
                                   const std::function<void(double)>& on_progress) {
  check_argument(bench.num_ranks >= 1, "num_ranks {}; at least one", bench.num_ranks);
  check_argument(bench.pairs >= 2, "pairs {}; at least two, the first is not counted", bench.pairs);
  check_argument(bench.repeats >= 1, "repeats {}; at least one", bench.repeats);
  check_argument(!bench.with_all_gather || bench.num_ranks <= 32,
                 "the all-gather baseline of {} ranks needs as many slots per token; at most 32",
                 bench.num_ranks);
  ExchangeBenchReport report;
  const int devices = bench.num_devices > 0 ? bench.num_devices : num_devices(bench.device);
  report.num_devices = std::clamp(devices, 1, bench.num_ranks);
  {
    const auto whole = make_backend({.device = {bench.device, 0}});
    report.device = whole->description();
    report.read_gbytes_per_s = whole->measure_read_bandwidth() * 1e-9;
    report.copy_gbytes_per_s = 2 * measure_copy(ops(*whole), ops(*whole)) * 1e-9;
  }
  for (std::size_t i = 0; i < bench.tokens_per_rank.size(); ++i) {
    const int tokens = bench.tokens_per_rank[i];
    check_argument(tokens >= 1, "tokens_per_rank {}; at least one", tokens);
    ExchangeConfig config = bench.exchange;
    config.max_tokens_per_rank = tokens;
    config.max_m = 0;
    config.peer_timeout = kSetUpTimeout;  // Ranks check large batches at their own pace.
    ExchangeBenchCase c{.tokens_per_rank = tokens};
    c.workspace_bytes = Exchange::workspace_bytes(config, bench.num_ranks, bench.device);
    const CaseResult mine = run_case(bench, config, tokens, false);
    c.exchange = mine.times, c.rows = mine.rows, c.checked_elements = mine.checked;
    if (bench.with_all_gather) {
      config.num_experts = config.num_topk = bench.num_ranks;
      const CaseResult gathered = run_case(bench, config, tokens, true);
      c.all_gather = gathered.times;
      c.checked_elements += gathered.checked;
    }
    report.cases.push_back(c);
    if (on_progress) {
      on_progress(static_cast<double>(i + 1) / static_cast<double>(bench.tokens_per_rank.size()));
    }
  }
  // By now the exchange has opened the way between the devices.
  if (report.num_devices > 1) {
    const auto to = make_backend(place_rank(bench.device, 0, bench.num_ranks, bench.num_devices));
    const auto from = make_backend(place_rank(bench.device, 1, bench.num_ranks, bench.num_devices));
    report.link_gbytes_per_s = measure_copy(ops(*to), ops(*from)) * 1e-9;
  }
  return report;
}

}  // namespace sluice
