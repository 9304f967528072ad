// fail.h - throwing errors and keeping promises.
#pragma once

#include <fmt/core.h>

#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "sluice/error.h"

namespace sluice {

namespace internal {
/// A format string that remembers where it was written.
template <class... Args>
struct LocatedFormat {
  fmt::format_string<Args...> text;
  std::source_location where;
  template <class S>
  consteval LocatedFormat(const S& s,  // NOLINT(google-explicit-constructor)
                          std::source_location w = std::source_location::current())
      : text(s), where(w) {}
};
}  // namespace internal

/// fail(ErrorCode::kInvalidArgument, "hidden {} is not a multiple of {}", hidden, 128);
template <class... Args>
[[noreturn]] void fail(ErrorCode code,
                       internal::LocatedFormat<std::type_identity_t<Args>...> format,
                       Args&&... args) {
  throw Error(code, fmt::format(format.text, std::forward<Args>(args)...), format.where);
}

/// The same, with the ranks to blame: Error::ranks().
template <class... Args>
[[noreturn]] void fail_of_ranks(ErrorCode code, std::vector<int> ranks,
                                internal::LocatedFormat<std::type_identity_t<Args>...> format,
                                Args&&... args) {
  throw Error(code, fmt::format(format.text, std::forward<Args>(args)...), std::move(ranks),
              format.where);
}

/// " 1 2", for "missing rank(s){}".
[[nodiscard]] inline std::string list_of(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += fmt::format(" {}", rank);
  return text;
}

/// Refuses bad input: check_argument(hidden % 128 == 0, "hidden {} is not ...", hidden).
template <class... Args>
void check_argument(bool ok, internal::LocatedFormat<std::type_identity_t<Args>...> format,
                    Args&&... args) {
  if (!ok)
    throw Error(ErrorCode::kInvalidArgument, fmt::format(format.text, std::forward<Args>(args)...),
                format.where);
}

}  // namespace sluice

/// A promise inside the library; kept in release builds.
#define SLUICE_ASSERT(condition)                                                     \
  do {                                                                               \
    if (!(condition))                                                                \
      ::sluice::fail(::sluice::ErrorCode::kInternal, "broken promise: " #condition); \
  } while (false)
