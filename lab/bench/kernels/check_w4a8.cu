// check_w4a8.cu - the W4A8 kernels against float64, over awkward shapes and row counts.
//
// First the activation functions by themselves (check_activation.cuh). For each case: h against the
// activation of the float64 product (per element: e4m3 rounding + a constant times the terms'
// magnitudes), y against the float64 product of the device's own h (bf16 rounding + constant * sum
// |a||w|), untouched padding, same bits twice, and same bits from both kernel configurations.
// Exit status 0 only if everything holds. Prints the worst constant seen.
#include <cmath>
#include <cstring>
#include <string>
#include <thread>

#include "bench/kernels/check_activation.cuh"
#include "bench/kernels/layer.cuh"

namespace sluice::cuda::bench {
namespace {

constexpr int kSampledRows = 12, kSampledColumns = 160;

double decode_e4m3(std::uint8_t c) {
  const int e = (c >> 3) & 15, m = c & 7;
  if ((c & 0x7f) == 0x7f) return std::nan("");
  const double v = e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10);
  return (c & 0x80) != 0 ? -v : v;
}
double decode_bf16(std::uint16_t b) {
  const std::uint32_t bits = std::uint32_t{b} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Case {
  int hidden, intermediate;
  std::vector<int> rows;
  int group;
  ScaleType scale_type;
  WeightCode code;
  bool is_contiguous, is_static;
  const char* activation = "swiglu";
  float x_static = 0.004f;
  bool is_token = false;  // x has one scale per row, h its own per 128; not with is_static
  std::string name() const {
    return "H " + std::to_string(hidden) + " I " + std::to_string(intermediate) + " E " +
           std::to_string(rows.size()) + " g" + std::to_string(group) +
           (scale_type == ScaleType::kBf16 ? " bf16" : " f32") +
           (code == WeightCode::kOnesComplement ? " 7-instr" : " 3-instr") +
           (is_contiguous ? " contiguous" : " masked") +
           (is_token       ? " token "
            : !is_static   ? " group "
            : x_static > 1 ? " huge "
                           : " static ") +
           activation;
  }
};

/// Host copy of one matrix of all experts.
struct HostMatrix {
  std::vector<std::uint8_t> codes, scales;
  int n, k, group;
  bool bf16;
  double scale(std::size_t e, int row, int col) const {
    const std::size_t at = (e * n + row) * (k / group) + col / group;
    if (bf16) return decode_bf16(reinterpret_cast<const std::uint16_t*>(scales.data())[at]);
    return reinterpret_cast<const float*>(scales.data())[at];
  }
  int weight(std::size_t e, int row, int col) const {
    const int v = codes[((e * n + row) * k + col) / 2] >> (col % 2 * 4) & 15;
    return v >= 8 ? v - 16 : v;
  }
};

/// Row `row` of matrix times activation codes x with scales xs: one for each `x_group` channels, or
/// null for a static one.
Sum dot(const HostMatrix& m, std::size_t e, int row, const std::uint8_t* x, const float* xs,
        float static_scale, int x_group = 128) {
  static const auto table = [] {
    std::vector<double> t(256);
    for (int i = 0; i < 256; ++i) t[i] = decode_e4m3(static_cast<std::uint8_t>(i));
    return t;
  }();
  Sum sum;
  for (int g = 0; g < m.k; g += m.group) {
    double part = 0, magnitude = 0;
    for (int k = g; k < g + m.group; ++k) {
      const double t = table[x[k]] * m.weight(e, row, k);
      part += t;
      magnitude += std::fabs(t);
    }
    const double s = m.scale(e, row, g) * (xs != nullptr ? xs[g / x_group] : static_scale);
    sum.value += part * s;
    sum.magnitude += magnitude * s;
  }
  return sum;
}

struct Outputs {
  std::vector<std::uint8_t> h;
  std::vector<float> h_scale;
  std::vector<std::uint16_t> y, y_single;
  bool operator==(const Outputs& o) const {
    return h == o.h && y == o.y && y_single == o.y_single &&
           std::memcmp(h_scale.data(), o.h_scale.data(), h_scale.size() * 4) == 0;
  }
};

struct Device {
  Buffer<std::uint8_t> x, h;
  Buffer<float> x_scale, h_scale;
  Buffer<std::uint16_t> y;
  Buffer<std::int32_t> num_rows, sync;
  Buffer<std::int64_t> row_offset;
};

Outputs run(const Case& c, const Weights& w, Device& d, const RowRanges& rows, KernelConfig config,
            bool in_one_kernel, int num_ctas = 132) {
  d.h.fill(0xa5);
  d.h_scale.fill(0xa5);
  d.y.fill(0xff);
  const ConfigChoice choice{.config = config, .num_ctas = num_ctas, .reason = "check"};
  const float s2 = 0.5f;
  const ActivationFn activation = parse_activation(c.activation);
  const Fp8RowsView x{.codes = d.x.data,
                      .scale = c.is_static ? nullptr : d.x_scale.data,
                      .static_scale = c.x_static,
                      .width = c.hidden,
                      .scale_per_row = c.is_token};
  const Fp8Rows h{d.h.data, c.is_static ? nullptr : d.h_scale.data, s2, c.intermediate};
  Outputs out;
  if (in_one_kernel) {
    launch_experts({.gate_up = w.gate_up(),
                    .down = w.down(),
                    .rows = rows,
                    .x = x,
                    .h = h,
                    .y = d.y.data,
                    .sync = d.sync.data,
                    .config = choice,
                    .activation = activation},
                   nullptr);
  } else {
    launch_gate_up({.weights = w.gate_up(),
                    .rows = rows,
                    .x = x,
                    .h = h,
                    .sync = d.sync.data,
                    .config = choice,
                    .activation = activation},
                   nullptr);
    launch_grouped_gemm({.weights = w.down(),
                         .rows = rows,
                         .x = h,
                         .y = d.y.data,
                         .sync = d.sync.data,
                         .config = choice},
                        nullptr);
  }
  SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
  out.h = d.h.download();
  out.h_scale = d.h_scale.download();
  out.y = d.y.download();
  for (const int v : d.sync.download()) {
    if (v != 0) std::printf("  sync words not zero after the launch\n"), std::exit(1);
  }
  return out;
}

void check_values(const Case& c, const HostMatrix (&m)[3], const std::vector<std::uint8_t>& x,
                  const std::vector<float>& xs, const std::vector<int>& base, const Outputs& out,
                  int e, Report& r) {
  const int hid = c.hidden, inter = c.intermediate;
  const ActivationFn fn = parse_activation(c.activation);
  for (int i = 0; i < std::min(kSampledRows, c.rows[e]); ++i) {
    const int n = c.rows[e];
    const int row = n <= kSampledRows ? i
                    : i < 4           ? i
                    : i < 8           ? n - 1 - (i - 4)
                                      : static_cast<int>(hash(i * 977 + e) % n);
    const std::size_t at = static_cast<std::size_t>(base[e]) + row;
    const float* xrow = c.is_static ? nullptr : &xs[c.is_token ? at : at * (hid / 128)];
    const int x_group = c.is_token ? hid : 128;
    const std::uint8_t* hrow = &out.h[at * inter];
    const float* hs = c.is_static ? nullptr : &out.h_scale[at * (inter / 128)];
    for (int j = 0; j < std::min(kSampledColumns, inter); ++j) {
      const int col = inter <= kSampledColumns ? j : static_cast<int>(hash(j * 31 + i) % inter);
      const Sum gate = dot(m[0], e, col, &x[at * hid], xrow, c.x_static, x_group);
      const Sum up = dot(m[1], e, col, &x[at * hid], xrow, c.x_static, x_group);
      check_hidden(fn, gate, up, decode_e4m3(hrow[col]), c.is_static ? 0.5 : hs[col / 128], r,
                   [&](double got, double want) { r.fail("h", e, row, col, got, want); });
    }
    for (int j = 0; j < std::min(kSampledColumns, hid); ++j) {
      const int col = hid <= kSampledColumns ? j : static_cast<int>(hash(j * 37 + i) % hid);
      const Sum want = dot(m[2], e, col, hrow, hs, 0.5f);
      const double got = decode_bf16(out.y[at * hid + col]);
      if (std::isnan(want.value) && std::isnan(got)) continue;
      const double err = std::fabs(got - want.value), round = std::fabs(want.value) * 0x1p-8;
      ++r.checked;
      if (want.magnitude > 0) r.worst_y = std::max(r.worst_y, (err - round) / want.magnitude);
      if (!(err <= round + kAccumulator * want.magnitude))
        r.fail("y", e, row, col, got, want.value);
    }
  }
}

/// Rows outside an expert's range keep their sentinel; rows inside are all written.
void check_padding(const Case& c, const std::vector<int>& base, std::size_t total,
                   const Outputs& out, Report& r) {
  std::vector<char> valid(total, 0);
  for (std::size_t e = 0; e < c.rows.size(); ++e) {
    for (int i = 0; i < c.rows[e]; ++i) valid[base[e] + i] = 1;
  }
  for (std::size_t row = 0; row < total; ++row) {
    for (int i = 0; i < c.hidden; ++i) {
      const std::uint16_t v = out.y[row * c.hidden + i];
      if ((v == 0xffff) == (valid[row] != 0)) {
        r.fail(valid[row] ? "y unwritten" : "y padding", -1, static_cast<int>(row), i, v, 0);
        break;
      }
    }
    if (valid[row]) continue;
    for (int i = 0; i < c.intermediate; ++i) {
      if (out.h[row * c.intermediate + i] != 0xa5) {
        r.fail("h padding", -1, static_cast<int>(row), i, 0, 0);
        break;
      }
    }
  }
}

bool run_case(const Case& c, int repeats = 1) {
  const int experts = static_cast<int>(c.rows.size());
  Weights w = make_weights({.num_experts = experts,
                            .hidden = c.hidden,
                            .intermediate = c.intermediate,
                            .group = c.group,
                            .scale_type = c.scale_type,
                            .code = c.code,
                            .seed = static_cast<std::uint64_t>(c.hidden + 3 * c.intermediate)});
  int max_m = 1;
  for (int n : c.rows) max_m = std::max(max_m, n);
  std::vector<int> base(experts);
  int next = c.is_contiguous ? 3 : 0;  // contiguous: gaps of 3 sentinel rows
  for (int e = 0; e < experts; ++e) {
    base[e] = c.is_contiguous ? next : e * max_m;
    next += c.rows[e] + 3;
  }
  const std::size_t total = c.is_contiguous ? next : static_cast<std::size_t>(experts) * max_m;
  Device d{.x = Buffer<std::uint8_t>(total * c.hidden),
           .h = Buffer<std::uint8_t>(total * c.intermediate),
           .x_scale = Buffer<float>(total * c.hidden / 128),
           .h_scale = Buffer<float>(total * c.intermediate / 128),
           .y = Buffer<std::uint16_t>(total * c.hidden),
           .num_rows = Buffer<std::int32_t>(experts),
           .sync = Buffer<std::int32_t>(sync_bytes(experts) / 4),
           .row_offset = Buffer<std::int64_t>(experts)};
  d.sync.fill(0);
  d.num_rows.upload(c.rows);
  d.row_offset.upload({base.begin(), base.end()});
  random_activations<<<1024, 256>>>(d.x.data, d.x.size, c.hidden, 77, Data::kUniform);
  random_scales<<<1024, 256>>>(d.x_scale.data, d.x_scale.size, 78, false, 1e-3f, 3.0f);
  std::vector<std::uint8_t> x = d.x.download();
  const std::vector<float> xs = d.x_scale.download();
  std::vector<char> valid(total, 0);
  for (int e = 0; e < experts; ++e)
    for (int i = 0; i < c.rows[e]; ++i) valid[base[e] + i] = 1;
  for (std::size_t row = 0; row < total; ++row)  // NaN in the padding must not spread
    if (!valid[row]) std::memset(&x[row * c.hidden], 0x7f, c.hidden);
  d.x.upload(x);
  const RowRanges rows{
      .num_experts = experts,
      .begin = c.is_contiguous ? d.row_offset.data : nullptr,
      .count = d.num_rows.data,
      .max_rows = static_cast<std::int64_t>(total),
      .max_rows_per_expert = c.is_contiguous ? static_cast<std::int64_t>(total) : max_m};
  const Outputs a = run(c, w, d, rows, KernelConfig::kDecode, true);
  bool twice = true;
  for (int i = 0; i < repeats; ++i) twice &= a == run(c, w, d, rows, KernelConfig::kDecode, true);
  const Outputs p = run(c, w, d, rows, KernelConfig::kPrefill, true);
  const Outputs s = run(c, w, d, rows, KernelConfig::kDecode, false);
  // Few CTAs: a ticket has several row tiles, and the ring goes round across many tiles.
  const bool few = a == run(c, w, d, rows, KernelConfig::kDecode, true, 1) &&
                   a == run(c, w, d, rows, KernelConfig::kPrefill, true, 2);
  HostMatrix m[3];
  for (int i = 0; i < 3; ++i) {
    m[i] = {w.codes[i].download(),
            w.scales[i].download(),
            i < 2 ? c.intermediate : c.hidden,
            i < 2 ? c.hidden : c.intermediate,
            c.group,
            c.scale_type == ScaleType::kBf16};
  }
  std::vector<Report> reports(experts);
  std::vector<std::thread> threads;
  for (int e = 0; e < experts; ++e) {
    threads.emplace_back([&, e] { check_values(c, m, x, xs, base, a, e, reports[e]); });
  }
  for (auto& t : threads) t.join();
  Report r;
  check_padding(c, base, total, a, r);
  for (const Report& one : reports) {
    r.worst_h = std::max(r.worst_h, one.worst_h);
    r.worst_y = std::max(r.worst_y, one.worst_y);
    r.checked += one.checked;
    r.failures += one.failures;
    r.num_hidden += one.num_hidden, r.bitten += one.bitten, r.num_nan += one.num_nan;
  }
  const bool configs = a == p, split = a == s;
  const bool has_limits = std::strcmp(c.activation, "swiglu") != 0;
  const bool ok =
      r.failures == 0 && twice && configs && split && few && (!has_limits || r.bitten > 0);
  std::printf(
      "%s %-58s %8lld values (of h %.0f %% beyond limits, %lld NaN), worst constant h 2^%.1f y "
      "2^%.1f, bits: twice %s, configs %s, two kernels %s, few CTAs %s\n",
      ok ? "ok  " : "FAIL", c.name().c_str(), r.checked,
      has_limits ? 100.0 * r.bitten / std::max(1ll, r.num_hidden) : 0.0, r.num_nan,
      std::log2(std::max(r.worst_h, 1e-9)), std::log2(std::max(r.worst_y, 1e-9)),
      twice ? "same" : "DIFFER", configs ? "same" : "DIFFER", split ? "same" : "DIFFER",
      few ? "same" : "DIFFER");
  std::fflush(stdout);
  return ok;
}

int check_all(bool is_short, bool is_tiny, int repeats) {
  const std::vector<int> all{0, 1, 3, 7, 8, 9, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 1024, 2, 0};
  const std::vector<int> few{0, 5, 0, 9, 33, 70, 0};
  const auto kBf16 = ScaleType::kBf16, kF32 = ScaleType::kF32;
  const auto k7 = WeightCode::kOnesComplement, k3 = WeightCode::kSignMagnitude;
  std::vector<Case> cases{
      {128, 128, few, 128, kBf16, k7, false, false}, {384, 128, few, 128, kBf16, k3, true, false},
      {128, 384, few, 128, kF32, k7, false, true},   {384, 1792, few, 32, kBf16, k7, true, false},
      {384, 384, few, 32, kF32, k3, false, true},    {1792, 384, few, 128, kF32, k3, true, true},
      {128, 128, {0}, 128, kBf16, k7, false, false}, {128, 128, {1}, 128, kBf16, k3, false, true},
  };
  // Down tiles of one and two steps, so many that a ticket has several: uneven, the last one short.
  std::vector<int> many(160);
  for (int e = 0; e < 160; ++e) many[e] = e % 4;
  many[9] = 70;
  cases.push_back({3456, 128, many, 128, kBf16, k3, false, false});
  cases.push_back({3456, 256, many, 32, kF32, k7, true, false});
  cases.push_back({3456, 128, many, 128, kBf16, k7, false, true});
  const char* const limits[] = {"swiglu:limit=0.25", "swiglu-oai:alpha=1.702,limit=0.25",
                                "situ:beta=0.5,linear_beta=0.25"};
  for (const char* const fn : limits) {
    cases.push_back({384, 384, few, 128, kBf16, k3, false, false, fn});
    cases.push_back({1792, 256, few, 32, kF32, k7, true, false, fn});
    cases.push_back({384, 256, few, 128, kBf16, k7, true, true, fn});
    cases.push_back({384, 256, few, 128, kF32, k3, false, true, fn, 1e38f});  // Infinite sums.
  }
  cases.push_back({384, 256, few, 128, kBf16, k3, false, true, "swiglu", 1e38f});
  const auto token = [&](Case c) {
    c.is_token = true;
    return c;
  };
  cases.insert(cases.begin() + 4, token({384, 384, few, 32, kBf16, k7, true, false}));
  cases.insert(cases.begin() + 5, token({1792, 384, few, 128, kF32, k3, false, false}));
  cases.push_back(token({128, 128, few, 128, kBf16, k7, false, false}));
  cases.push_back(token({3456, 256, many, 128, kBf16, k3, true, false}));
  cases.push_back(token({384, 256, few, 32, kF32, k3, false, false, limits[0]}));
  if (is_tiny) cases.resize(7);  // all kinds of activation scales, both groups, both codes
  if (!is_short && !is_tiny) {
    cases.push_back({1792, 384, all, 128, kBf16, k7, false, false});
    cases.push_back({3584, 1792, all, 128, kBf16, k3, true, false});
    cases.push_back({7168, 2048, all, 128, kBf16, k7, false, false});
    cases.push_back({7168, 2048, all, 128, kBf16, k3, true, true});
    cases.push_back({7168, 384, all, 32, kBf16, k7, false, false});
    cases.push_back({7168, 384, all, 32, kBf16, k3, true, true});
    cases.push_back({1792, 7168, all, 128, kF32, k7, true, false});
    cases.push_back(token({7168, 384, all, 128, kBf16, k3, false, false}));
    cases.push_back(token({1792, 384, all, 32, kBf16, k7, true, false}));
  }
  int failed = 0;
  for (const char* const fn : kActivations) failed += check_edges(fn) + check_precision(fn);
  for (const Case& c : cases) failed += run_case(c, repeats) ? 0 : 1;
  std::printf("%d failures in %zu cases and the functions by themselves\n", failed, cases.size());
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace sluice::cuda::bench

int main(int argc, char** argv) {
  try {
    bool is_short = false, is_tiny = false;
    int repeats = 1;
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], "--short") == 0) is_short = true;  // small shapes
      if (std::strcmp(argv[i], "--tiny") == 0) is_tiny = true;    // seven cases, for sanitizers
      if (std::strcmp(argv[i], "--repeats") == 0 && i + 1 < argc) repeats = std::atoi(argv[++i]);
    }
    return sluice::cuda::bench::check_all(is_short, is_tiny, repeats);
  } catch (const std::exception& e) {
    std::printf("error: %s\n", e.what());
    return 1;
  }
}
