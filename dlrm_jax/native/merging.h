// What kernels of table rows share: where rows lie, and how the gradients of lanes with the same row are added.

#ifndef DLRM_JAX_NATIVE_MERGING_H_
#define DLRM_JAX_NATIVE_MERGING_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "places.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {

// Lanes ahead of the one at work whose memory is asked for: enough to keep every line-fill buffer of a core busy.
constexpr int64_t kAhead = 24;
constexpr int64_t kLine = 64;

template <bool kToWrite>
inline void Prefetch(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(row) + at, kToWrite);
}

// A table, or as many rows as there are lanes.
struct Rows {
  explicit Rows(const xla::ffi::AnyBuffer& buffer) : data(static_cast<char*>(buffer.untyped_data())) {
    rows = buffer.dimensions()[0];
    bytes = buffer.size_bytes() / std::max<int64_t>(rows, 1);
  }

  char* At(int64_t row) const { return data + row * bytes; }

  char* data;
  int64_t rows, bytes;  // bytes of a row
};

// Appends the tables that a call changes: its results, and in the same memory the first of its remaining arguments. An
// error if they are not.
inline xla::ffi::Error AddTablesInPlace(const xla::ffi::RemainingArgs& args, const xla::ffi::RemainingRets& results,
                                        std::vector<Rows>& tables) {
  for (size_t i = 0; i < results.size(); ++i) {
    tables.emplace_back(*results.get<xla::ffi::AnyBuffer>(i).value());
    if (args.get<xla::ffi::AnyBuffer>(i)->untyped_data() != tables.back().data) {
      return xla::ffi::Error::Internal("a table was not given in place");
    }
  }
  return xla::ffi::Error::Success();
}

inline bool InTable(int32_t row, int64_t rows) { return row >= 0 && row < rows; }

// work(numbers of a row), as a constant where it is the usual one: a row is one vector then.
template <typename Work>
void WithDim(int64_t dim, const Work& work) {
  dim == 16 ? work(std::integral_constant<int64_t, 16>()) : work(dim);
}

constexpr int kPlacesOfRows = 101;  // of the uses of memory that a thread keeps
constexpr int64_t kMostMergers = 4;

// Into how many parts lanes are cut that merge. Whatever the threads are, so that rows come in one order.
inline int64_t MergersOf(int64_t lanes) { return std::clamp<int64_t>(lanes / kLanesPerPiece, 1, kMostMergers); }

// Those lanes of a call whose rows have a hash of this part's. In the order of the batch, so that every sum is.
struct Part {
  static int64_t Words(int64_t lanes) { return 3 * (lanes + 1); }  // of memory

  int32_t *lane, *place;  // of each: its number, and where its row stands in `distinct`
  int32_t* distinct;
  int64_t lanes = 0, count = 0;
};

inline uint64_t HashOf(int32_t row) { return static_cast<uint32_t>(row) * 0x9e3779b97f4a7c15u; }

// The part's lanes and distinct rows, in `memory`; found(row, the part) is called for each of these. Their places stay in
// a cache, where a number for each row of the tables would be memory that no cache holds.
template <typename Found>
Part FindDistinct(const int32_t* row, int64_t lanes, int64_t rows, uint64_t which, uint64_t parts, uint32_t* memory,
                  const Found& found) {
  int32_t* words = reinterpret_cast<int32_t*>(memory);
  Part part{words, words + lanes + 1, words + 2 * (lanes + 1)};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    part.lane[part.lanes] = lane;
    part.lanes += InTable(row[lane], rows) && (HashOf(row[lane]) >> 32) * parts >> 32 == which;
  }
  Places<kPlacesOfRows> places(part.lanes);
  for (int64_t i = 0; i < part.lanes; ++i) {
    const int32_t own = row[part.lane[i]];
    int32_t& at = places.At(HashOf(own) >> 16, [&](int32_t place) { return part.distinct[place] == own; });
    if (at < 0) {
      at = part.count;
      part.distinct[part.count++] = own;
      found(own, part);
    }
    part.place[i] = at;
  }
  return part;
}

// The sums of the part's distinct rows, which begin at `total`.
inline void AddLanes(const Part& part, const float* grad, int64_t dim, float* total) {
  WithDim(dim, [=](auto width) {
    int32_t begun = 0;
    for (int64_t i = 0; i < part.lanes; ++i) {
      if (i + kAhead < part.lanes) Prefetch<false>(grad + part.lane[i + kAhead] * width, width * sizeof(float));
      const float* from = grad + part.lane[i] * width;
      float* to = total + part.place[i] * width;
      if (part.place[i] == begun) {
        ++begun;
        std::memcpy(to, from, width * sizeof(float));
      } else {
        for (int64_t j = 0; j < width; ++j) to[j] += from[j];
      }
    }
  });
}

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_MERGING_H_
