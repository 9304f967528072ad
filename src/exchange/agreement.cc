#include "exchange/agreement.h"

#include <algorithm>
#include <cstring>

#include "core/fail.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

/// name NUL value NUL name NUL value NUL ...
std::string encode(const Agreement& fields) {
  std::string text;
  for (const auto& [name, value] : fields) {
    text.append(name).push_back('\0');
    text.append(value).push_back('\0');
  }
  return text;
}

Agreement decode(const std::string& text) {
  Agreement fields;
  for (std::size_t at = 0; at < text.size();) {
    const std::string name = text.c_str() + at;
    at += name.size() + 1;
    const std::string value = at < text.size() ? text.c_str() + at : "";
    at += value.size() + 1;
    fields.emplace_back(name, value);
  }
  return fields;
}

/// Every rank's text. Two rounds, because all_gather wants equal sizes and texts may differ in
/// length.
std::vector<std::string> gather_texts(Transport& transport, std::string mine,
                                      std::chrono::milliseconds timeout) {
  const std::uint64_t size = mine.size();
  const auto sizes = transport.all_gather(std::as_bytes(std::span(&size, 1)), timeout);
  std::vector<std::uint64_t> lengths;
  for (const auto& bytes : sizes) std::memcpy(&lengths.emplace_back(), bytes.data(), sizeof(size));
  mine.resize(*std::ranges::max_element(lengths));
  const auto texts = transport.all_gather(std::as_bytes(std::span(mine)), timeout);
  std::vector<std::string> result;
  for (std::size_t r = 0; r < texts.size(); ++r) {
    result.emplace_back(reinterpret_cast<const char*>(texts[r].data()), lengths[r]);
  }
  return result;
}

}  // namespace

void require_agreement(Transport& transport, const Agreement& fields,
                       std::chrono::milliseconds timeout, const std::string& operation) {
  std::vector<std::string> texts;
  try {
    texts = gather_texts(transport, encode(fields), timeout);
  } catch (const Error& error) {
    fail_of_ranks(error.code(), error.ranks(), "{}, comparing configurations: {}", operation,
                  error.what());
  }
  const auto differs = std::ranges::find_if(texts, [&](const auto& t) { return t != texts[0]; });
  if (differs == texts.end()) return;

  // The first field, in rank 0's order, on which any rank differs; then every rank that does.
  std::vector<Agreement> ranks;
  for (const std::string& text : texts) ranks.push_back(decode(text));
  std::size_t num_fields = 0;
  for (const Agreement& rank : ranks) num_fields = std::max(num_fields, rank.size());
  for (std::size_t i = 0; i < num_fields; ++i) {
    const auto none = std::pair<std::string, std::string>{"(no further field)", ""};
    const auto field = [&](std::size_t r) { return i < ranks[r].size() ? ranks[r][i] : none; };
    const auto [name, value] = field(0);
    std::string others;
    for (std::size_t r = 1; r < ranks.size(); ++r) {
      const auto [name_r, value_r] = field(r);
      if (name_r == name && value_r == value) continue;
      others +=
          fmt::format(", rank {} has '{}'{}", r, value_r, name_r == name ? "" : " for " + name_r);
    }
    if (others.empty()) continue;
    fail(ErrorCode::kTransport, "ranks disagree on {}: rank 0 has '{}'{}{}", name, value, others,
         name == kCall ? ": ranks must make the same calls in the same order" : "");
  }
}

}  // namespace sluice
