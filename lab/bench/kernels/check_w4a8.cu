// check_w4a8.cu - the W4A8 kernels against float64, over awkward shapes and row counts.
//
// First the activation functions by themselves (check_activation.cuh). For each case: h against the
// activation of the float64 product (per element: e4m3 rounding + a constant times the terms'
// magnitudes), y against the float64 product of the device's own h (bf16 rounding + constant * sum
// |a||w|), untouched padding, same bits twice, and same bits from both kernel configurations; of
// mxfp4 also which matrices are packed as far ones. The cases: check_cases.cuh.
//
//   check_w4a8 [--short|--tiny|--carried] [--mxfp4|--int4] [--repeats N]
//
// Exit status 0 only if everything holds. Prints the worst constant seen.
#include <cmath>
#include <cstring>
#include <string>
#include <thread>

#include "bench/kernels/check_cases.cuh"
#include "bench/kernels/layer.cuh"

namespace sluice::cuda::bench {
namespace {

constexpr int kSampledRows = 12, kSampledColumns = 160;

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

/// Whether mxfp4's matrices are packed as their scales demand.
bool has_expected_matrices(const Case& c, const Weights& w) {
  if (c.code != WeightCode::kE2M1) return true;
  const auto experts = static_cast<int>(c.rows.size());
  const int up = count_far(w.packed_gate_up, w.gate_up().shape, experts);
  const int down = count_far(w.packed_down, w.down().shape, experts);
  const int want = c.spread == Spread::kFar      ? experts
                   : c.spread == Spread::kOneFar ? experts / 2
                                                 : 0;
  if (up == want && down == want) return true;
  std::printf("FAIL %s: %d and %d of %d matrices are far, not %d\n", c.name().c_str(), up, down,
              experts, want);
  return false;
}

bool run_case(const Case& c, int repeats = 1) {
  const int experts = static_cast<int>(c.rows.size());
  Weights w = make_weights({.num_experts = experts,
                            .hidden = c.hidden,
                            .intermediate = c.intermediate,
                            .group = c.group,
                            .scale_type = c.scale_type,
                            .code = c.code,
                            .seed = static_cast<std::uint64_t>(c.hidden + 3 * c.intermediate),
                            .spread = c.spread});
  if (!has_expected_matrices(c, w)) return false;
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
  const Outputs p64 = run(c, w, d, rows, KernelConfig::kPrefill64, true);
  const Outputs s = run(c, w, d, rows, KernelConfig::kDecode, false);
  // Few CTAs: a ticket has several row tiles, and the ring goes round across many tiles.
  const bool few = a == run(c, w, d, rows, KernelConfig::kDecode, true, 1) &&
                   a == run(c, w, d, rows, KernelConfig::kPrefill, true, 2) &&
                   a == run(c, w, d, rows, KernelConfig::kPrefill64, true, 2);
  HostMatrix m[3];
  for (int i = 0; i < 3; ++i) {
    m[i] = {w.codes[i].download(),
            w.scales[i].download(),
            i < 2 ? c.intermediate : c.hidden,
            i < 2 ? c.hidden : c.intermediate,
            c.group,
            c.scale_type};
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
  const bool configs = a == p && a == p64, split = a == s;
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

int check_all(const CaseChoice& choice, int repeats) {
  if (!choice.has_int4 && !choice.has_mxfp4) {
    throw Error(ErrorCode::kInvalidArgument, "--mxfp4 and --int4 leave no cases");
  }
  const std::vector<Case> cases = all_cases(choice);
  int failed = 0;
  if (choice.has_int4) {
    for (const char* const fn : kActivations) failed += check_edges(fn) + check_precision(fn);
  }
  for (const Case& c : cases) failed += run_case(c, repeats) ? 0 : 1;
  std::printf("%d failures in %zu cases and the functions by themselves\n", failed, cases.size());
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace sluice::cuda::bench

int main(int argc, char** argv) {
  try {
    sluice::cuda::bench::CaseChoice choice;
    int repeats = 1;
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], "--short") == 0) choice.is_short = true;      // small shapes
      if (std::strcmp(argv[i], "--tiny") == 0) choice.is_tiny = true;        // few, for sanitizers
      if (std::strcmp(argv[i], "--carried") == 0) choice.is_carried = true;  // the same
      if (std::strcmp(argv[i], "--mxfp4") == 0) choice.has_int4 = false;
      if (std::strcmp(argv[i], "--int4") == 0) choice.has_mxfp4 = false;
      if (std::strcmp(argv[i], "--repeats") == 0 && i + 1 < argc) repeats = std::atoi(argv[++i]);
    }
    return sluice::cuda::bench::check_all(choice, repeats);
  } catch (const std::exception& e) {
    std::printf("error: %s\n", e.what());
    return 1;
  }
}
