// reception.h - rank 0's door: connections that have not yet proved that they belong to the job.
//
// Whoever cannot prove it within two seconds is shut out, counted, and disturbs nobody.
#pragma once

#include <poll.h>

#include <cstddef>
#include <functional>
#include <list>
#include <string>
#include <vector>

#include "core/file_descriptor.h"
#include "transport/handshake.h"
#include "transport/socket_io.h"

namespace sluice {

class Reception {
 public:
  struct Rules {
    Greeting greeting;
    std::string secret;
    const char* guest;            ///< What a guest calls itself in its proof.
    std::size_t num_files = 0;    ///< Descriptors that come with a Join.
    bool is_same_user = false;    ///< Only processes of this user may come.
    std::size_t max_guests = 64;  ///< Most that are heard at the same time.
  };
  /// One that has proved who it is.
  struct Guest {
    FileDescriptor socket;
    Nonce nonce;  ///< The host's, in its Hello.
    Join join;
    std::vector<FileDescriptor> files;
  };
  using TakeIn = std::function<void(Guest&)>;

  Reception(FileDescriptor listener, Rules rules);

  /// Adds what poll() has to look at; until when it may sleep at most, for `deadline`.
  [[nodiscard]] Deadline add_to(std::vector<pollfd>& entries, Deadline deadline) const;
  /// Hears who has spoken, and gives those who have proved it to `take_in`, which may throw; then
  /// lets in whoever stands at the door.
  void hear_all(const TakeIn& take_in);

  [[nodiscard]] int num_strangers() const noexcept { return num_strangers_; }

 private:
  struct Newcomer {
    Guest guest;
    Deadline until;
    std::size_t num_received = 0;
  };
  [[nodiscard]] bool accept_one();
  [[nodiscard]] bool hear(Newcomer& newcomer, const TakeIn& take_in);

  FileDescriptor listener_;
  Rules rules_;
  std::list<Newcomer> newcomers_;
  int num_strangers_ = 0;
};

}  // namespace sluice
