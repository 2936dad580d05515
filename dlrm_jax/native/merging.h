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

// Those lanes of a call whose rows have a hash of this part's, in the order of the batch. The gradients of a row's lanes
// are added up leaf by leaf, a leaf being so many lanes of the call, and the partial sums as a tree, see packing.h: so
// those of several devices are the same sum.
struct Part {
  struct Row {
    int32_t number, newest, leaf;  // its newest partial sum, and the leaf of that; -1: none
  };
  struct Sum {
    int32_t leaf, before;  // the one of the same row before it; -1: none
  };

  static int64_t Words(int64_t lanes) { return 7 * (lanes + 1); }  // of memory

  Part() = default;
  Part(uint32_t* memory, int64_t most)
      : lane(reinterpret_cast<int32_t*>(memory)), sum(lane + most + 1), row(reinterpret_cast<Row*>(sum + most + 1)),
        sums(reinterpret_cast<Sum*>(row + most + 1)) {}

  // To which partial sum lanes of this leaf go: the newest of their row's, or one more.
  int32_t SumOf(Row& of, int32_t leaf) {
    if (of.leaf != leaf) {
      sums[partial] = {leaf, of.newest};
      of = {of.number, static_cast<int32_t>(partial++), leaf};
    }
    return of.newest;
  }

  int32_t *lane, *sum;  // of each lane: its number, and to which partial sum it goes
  Row* row;             // the distinct ones
  Sum* sums;            // the partial ones
  int64_t lanes = 0, rows = 0, partial = 0;  // how many
};

inline uint64_t HashOf(int32_t row) { return static_cast<uint32_t>(row) * 0x9e3779b97f4a7c15u; }

// The part's lanes and distinct rows, in `memory`; found(row, the part) is called for each of these. Their places stay in
// a cache, where a number for each row of the tables would be memory that no cache holds.
template <typename Found>
Part FindDistinct(const int32_t* row, int64_t lanes, int64_t rows, int64_t leaf_lanes, uint64_t which, uint64_t parts,
                  uint32_t* memory, const Found& found) {
  Part part(memory, lanes);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    part.lane[part.lanes] = lane;
    part.lanes += InTable(row[lane], rows) && (HashOf(row[lane]) >> 32) * parts >> 32 == which;
  }
  Places<kPlacesOfRows> places(part.lanes);
  int32_t leaf = 0;
  int64_t end = leaf_lanes;  // of the leaf
  for (int64_t i = 0; i < part.lanes; ++i) {
    for (; part.lane[i] >= end; end += leaf_lanes) ++leaf;
    const int32_t own = row[part.lane[i]];
    int32_t& at = places.At(HashOf(own) >> 16, [&](int32_t place) { return part.row[place].number == own; });
    if (at < 0) {
      at = part.rows;
      part.row[part.rows++] = {own, -1, -1};
      found(own, part);
    }
    part.sum[i] = part.SumOf(part.row[at], leaf);
  }
  return part;
}

// The part's partial sums, one after another.
inline void AddLanes(const Part& part, const float* grad, int64_t dim, float* sums) {
  WithDim(dim, [=](auto width) {
    int32_t begun = 0;
    for (int64_t i = 0; i < part.lanes; ++i) {
      if (i + kAhead < part.lanes) Prefetch<false>(grad + part.lane[i + kAhead] * width, width * sizeof(float));
      const float* from = grad + part.lane[i] * width;
      float* to = sums + part.sum[i] * width;
      if (part.sum[i] == begun) {
        ++begun;
        std::memcpy(to, from, width * sizeof(float));
      } else {
        for (int64_t j = 0; j < width; ++j) to[j] += from[j];
      }
    }
  });
}

// The sum of a row, of its partial sums. Neighbors in the tree are those whose leaves differ in the lowest bits alone, so
// they come together before what differs from them in a higher bit.
template <typename Size>
const float* SumOfRow(const Part& part, int64_t place, Size dim, float* sums) {
  const int32_t newest = part.row[place].newest;
  if (part.sums[newest].before < 0) return sums + newest * dim;
  int32_t stack[33];    // sums whose neighbors are yet to come, newest leaf first
  uint32_t differ[32];  // the bits in which the leaves of one and the next differ
  int top = 0;
  stack[0] = newest;
  for (int32_t last = newest, next = part.sums[last].before; top > 0 || next >= 0; last = next, next = part.sums[next].before) {
    const uint32_t bits = next < 0 ? ~0u : part.sums[last].leaf ^ part.sums[next].leaf;
    for (; top > 0 && differ[top - 1] < bits; --top) {
      float* to = sums + stack[top - 1] * dim;
      const float* from = sums + stack[top] * dim;
      for (int64_t i = 0; i < dim; ++i) to[i] += from[i];
    }
    if (next < 0) break;
    differ[top] = bits;
    stack[++top] = next;
  }
  return sums + stack[0] * dim;
}

constexpr int kSumsOfRows = 102;  // of the uses of memory that a thread keeps

// use(place of a row in the part, the sum of its gradients, their number) for each of the part's rows that has lanes.
template <typename Use>
void ForSums(const Part& part, const float* grad, int64_t dim, const Use& use) {
  float* sums = reinterpret_cast<float*>(Scratch<kSumsOfRows>(part.partial * dim));
  AddLanes(part, grad, dim, sums);
  WithDim(dim, [&](auto n) {
    for (int64_t place = 0; place < part.rows; ++place) {
      if (part.row[place].newest >= 0) use(place, SumOfRow(part, place, n, sums), n);
    }
  });
}

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_MERGING_H_
