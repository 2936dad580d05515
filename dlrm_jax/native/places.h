// Equal things meet without a sort: a hash table of the places of distinct ones.

#ifndef DLRM_JAX_NATIVE_PLACES_H_
#define DLRM_JAX_NATIVE_PLACES_H_

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace dlrm {

// Room for `most` places, in memory that belongs to this thread and to `Use`. At least half of it is empty.
template <int Use>
class Places {
 public:
  explicit Places(int64_t most) {
    while (size_ < 2 * most) size_ *= 2;
    slots_ = reinterpret_cast<int32_t*>(Scratch<Use>(size_));
    std::fill_n(slots_, size_, -1);
  }

  // Where the place stands for which is_same(place) holds, or, if there is none, -1, to be overwritten with a new one.
  template <typename IsSame>
  int32_t& At(uint64_t hash, const IsSame& is_same) {
    int64_t slot = hash & (size_ - 1);
    while (slots_[slot] >= 0 && !is_same(slots_[slot])) slot = (slot + 1) & (size_ - 1);
    return slots_[slot];
  }

 private:
  int64_t size_ = 64;
  int32_t* slots_;
};

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_PLACES_H_
