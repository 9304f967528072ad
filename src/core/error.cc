#include "sluice/error.h"

#include <string>
#include <utility>

namespace sluice {

const char* to_string(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid argument";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kOutOfMemory:
      return "out of memory";
    case ErrorCode::kCorruptFile:
      return "corrupt file";
    case ErrorCode::kIo:
      return "i/o error";
    case ErrorCode::kCuda:
      return "cuda error";
    case ErrorCode::kTransport:
      return "transport error";
    case ErrorCode::kPeerTimeout:
      return "peer timeout";
    case ErrorCode::kInterrupted:
      return "interrupted";
    case ErrorCode::kInternal:
      return "internal error";
  }
  return "unknown error";
}

int exit_status(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidArgument:
    case ErrorCode::kUnsupported:
      return 2;
    case ErrorCode::kCorruptFile:
    case ErrorCode::kIo:
      return 3;
    case ErrorCode::kTransport:
    case ErrorCode::kPeerTimeout:
      return 4;
    default:
      return 5;
  }
}

Error::Error(ErrorCode code, const std::string& message, std::source_location where)
    : std::runtime_error(message), code_(code), where_(where) {}

Error::Error(ErrorCode code, const std::string& message, std::vector<int> ranks,
             std::source_location where)
    : std::runtime_error(message),
      code_(code),
      ranks_(std::make_shared<const std::vector<int>>(std::move(ranks))),
      where_(where) {}

const std::vector<int>& Error::ranks() const noexcept {
  static const std::vector<int> none;
  return ranks_ ? *ranks_ : none;
}

}  // namespace sluice
