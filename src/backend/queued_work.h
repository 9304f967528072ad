// queued_work.h - how a backend queues work that comes again: recorded, kept as it is, or with
// other arguments each time; and whose turn it is. The classes here that are not abstract are for
// devices without streams, whose calls return when they are done.
#pragma once

#include <functional>
#include <vector>

#include "sluice/stream.h"

namespace sluice {

/// Work that was recorded once and can be replayed: a graph on a GPU.
class Recording {
 public:
  virtual ~Recording() = default;
  /// Queues the work again. Asynchronous where the device has streams.
  virtual void replay() = 0;
  /// Microseconds between neighbouring marks of the last replay; waits for it.
  [[nodiscard]] virtual std::vector<double> marks_us() = 0;
};
/// Queues work, calling its argument at the points in time that are of interest.
using MarkedWork = std::function<void(const std::function<void()>& mark)>;

/// Work that is queued again and again, each time on a stream of the caller's choice.
class RepeatedWork {
 public:
  virtual ~RepeatedWork() = default;
  /// Stream: work queued before stays as it is. While `stream` is captured, so is the work itself.
  virtual void queue(Stream stream) = 0;
};

/// A few kernels in a row that are queued often, each time with other arguments: on a GPU as a
/// graph, which takes the host less time than to launch them, and least where most arguments are
/// those of the last time.   Threads: one at a time.
class KernelChain {
 public:
  virtual ~KernelChain() = default;
  /// Queues what `work` queues on `stream`: kernels alone, eight at most. While `stream` is
  /// captured, so is the work itself.
  virtual void queue(Stream stream, const std::function<void(Stream)>& work) { work(stream); }
};

/// Orders the uses of what calls on several streams share.
class StreamOrder {
 public:
  /// What before() saw of its stream.
  struct Seen {
    unsigned long long capture = 0;  ///< 0: none is going on.
  };
  virtual ~StreamOrder() = default;
  /// Work queued on `stream` from here on begins when everything has ended that the last after() on
  /// another stream covers. While a stream is captured, only uses in the same capture count: graphs
  /// are ordered by whoever launches them.
  virtual Seen before(Stream stream) {
    (void)stream;
    return {};
  }
  /// Ends a use: covers what was queued on `stream` so far.
  virtual void after(Stream stream) { (void)stream; }
  /// The same for what was queued since before() in one go, which asks the device no second time.
  virtual void after(Stream stream, Seen seen) { (void)stream, (void)seen; }
};

}  // namespace sluice
