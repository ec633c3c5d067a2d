// Prefetches memory that will be packed next while panels in the cache are multiplied, during which
// the memory bus would otherwise be idle.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace unimoe {

// Distributes the cache lines of one or two ranges of memory over steps of multiplication.
class Ahead {
 public:
  // Where some steps start to fetch, and that they fetch a line every so many steps.
  struct Share {
    const char* from;
    int64_t every;
  };

  Ahead() : from_{reinterpret_cast<const char*>(this)} {}

  // Of `bytes` from both addresses on, which may be the same, within so many steps.
  Ahead(const void* first, const void* second, int64_t bytes, int64_t steps)
      : from_{static_cast<const char*>(first), static_cast<const char*>(second)},
        bytes_(bytes),
        all_(first == second ? bytes : 2 * bytes),
        every_(1) {
    while (all_ > 0 && 2 * every_ * all_ <= steps * kLineBytes) every_ *= 2;
  }

  Share take(int64_t steps) {
    if (fetched_ >= all_) return {from_[0], kNever};
    const Share share{from_[fetched_ / bytes_] + fetched_ % bytes_, every_};
    fetched_ += (steps + every_ - 1) / every_ * kLineBytes;
    return share;
  }

 private:
  // More steps than a product is cut into.
  static constexpr int64_t kNever = int64_t{1} << 40;

  const char* from_[2] = {};
  int64_t bytes_ = 0;
  int64_t all_ = 0;
  int64_t every_ = kNever;
  int64_t fetched_ = 0;
};

}  // namespace unimoe
