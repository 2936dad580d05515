// Row kernels of a table: merge of the lanes of a batch, gather and scatter of rows. See rows.py for what they promise.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "places.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Lanes ahead of the one at work whose memory is asked for: enough to keep every line-fill buffer of a core busy.
constexpr int64_t kAhead = 24;
constexpr int64_t kLine = 64;

template <bool kToWrite>
inline void Prefetch(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(row) + at, kToWrite);
}

// A table, or as many rows as there are lanes.
struct Rows {
  explicit Rows(const ffi::AnyBuffer& buffer) : data(static_cast<char*>(buffer.untyped_data())) {
    rows = buffer.dimensions()[0];
    bytes = buffer.size_bytes() / std::max<int64_t>(rows, 1);
  }

  char* data;
  int64_t rows, bytes;  // bytes of a row
};

inline bool InTable(int32_t row, int64_t rows) { return row >= 0 && row < rows; }

// With a size that the compiler knows, copying a row is a few vector instructions instead of a call.
template <typename Copy>
void WithRowBytes(int64_t bytes, const Copy& copy) {
  switch (bytes) {
    case 4: return copy(std::integral_constant<int64_t, 4>());
    case 32: return copy(std::integral_constant<int64_t, 32>());
    case 64: return copy(std::integral_constant<int64_t, 64>());
    default: return copy(bytes);
  }
}

void GatherRows(const Rows& table, const int32_t* row, int64_t from, int64_t to, char* out) {
  WithRowBytes(table.bytes, [=](auto bytes) {
    for (int64_t lane = from; lane < to; ++lane) {
      const int32_t ahead = lane + kAhead < to ? row[lane + kAhead] : -1;
      if (InTable(ahead, table.rows)) Prefetch<false>(table.data + ahead * bytes, bytes);
      if (InTable(row[lane], table.rows)) {
        std::memcpy(out + lane * bytes, table.data + row[lane] * bytes, bytes);
      } else {
        std::memset(out + lane * bytes, 0, bytes);
      }
    }
  });
}

void ScatterRows(const Rows& table, const int32_t* row, int64_t from, int64_t to, const char* in) {
  WithRowBytes(table.bytes, [=](auto bytes) {
    for (int64_t lane = from; lane < to; ++lane) {
      const int32_t ahead = lane + kAhead < to ? row[lane + kAhead] : -1;
      if (InTable(ahead, table.rows)) Prefetch<true>(table.data + ahead * bytes, bytes);
      if (InTable(row[lane], table.rows)) std::memcpy(table.data + row[lane] * bytes, in + lane * bytes, bytes);
    }
  });
}

// Results: the rows of each table.
ffi::Error Gather(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> row, ffi::RemainingArgs args, ffi::RemainingRets results) {
  std::vector<Rows> tables, outs;
  for (size_t i = 0; i < results.size(); ++i) {
    tables.emplace_back(*args.get<ffi::AnyBuffer>(i));
    outs.emplace_back(*results.get<ffi::AnyBuffer>(i).value());
  }
  const int64_t lanes = row.element_count(), pieces = dlrm::PiecesOf(pool, lanes);
  dlrm::ParallelFor(pool, pieces, [&](int64_t piece) {
    for (size_t i = 0; i < tables.size(); ++i) {
      GatherRows(tables[i], row.typed_data(), piece * lanes / pieces, (piece + 1) * lanes / pieces, outs[i].data);
    }
  });
  return ffi::Error::Success();
}

// Arguments after `row`: the tables, then the new rows of each. Results: the tables, in place.
ffi::Error Scatter(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> row, ffi::RemainingArgs args, ffi::RemainingRets results) {
  std::vector<Rows> tables, ins;
  for (size_t i = 0; i < results.size(); ++i) {
    tables.emplace_back(*results.get<ffi::AnyBuffer>(i).value());
    ins.emplace_back(*args.get<ffi::AnyBuffer>(results.size() + i));
    if (args.get<ffi::AnyBuffer>(i)->untyped_data() != tables[i].data) {
      return ffi::Error::Internal("a table was not given in place");
    }
  }
  const int64_t lanes = row.element_count(), pieces = dlrm::PiecesOf(pool, lanes);
  dlrm::ParallelFor(pool, pieces, [&](int64_t piece) {
    for (size_t i = 0; i < tables.size(); ++i) {
      ScatterRows(tables[i], row.typed_data(), piece * lanes / pieces, (piece + 1) * lanes / pieces, ins[i].data);
    }
  });
  return ffi::Error::Success();
}

constexpr int kMergeLists = 100, kMergePlaces = 101;  // of the uses of memory that a thread keeps
constexpr int64_t kMergeParts = 4;  // at most, whatever the threads are, so that rows come in one order

// Those lanes of a call whose rows have a hash of this part's. In the order of the batch, so that every sum is.
struct Part {
  int32_t *lane, *place;  // of each: its number, and where its row stands in `distinct`
  int32_t* distinct;
  int64_t lanes, count;
};

inline uint64_t HashOf(int32_t row) { return static_cast<uint32_t>(row) * 0x9e3779b97f4a7c15u; }

// The part's lanes and distinct rows. Their places stay in a cache, where a number for each row of the tables would be
// memory that no cache holds.
void FindDistinct(const int32_t* row, int64_t lanes, int64_t rows, uint64_t which, uint64_t parts, Part& part) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    part.lane[part.lanes] = lane;
    part.lanes += InTable(row[lane], rows) && (HashOf(row[lane]) >> 32) * parts >> 32 == which;
  }
  dlrm::Places<kMergePlaces> places(part.lanes);
  for (int64_t i = 0; i < part.lanes; ++i) {
    const int32_t own = row[part.lane[i]];
    int32_t& at = places.At(HashOf(own) >> 16, [&](int32_t place) { return part.distinct[place] == own; });
    if (at < 0) {
      at = part.count;
      part.distinct[part.count++] = own;
    }
    part.place[i] = at;
  }
}

// The sums of the part's distinct rows, which begin at `total`.
void AddLanes(const Part& part, const float* grad, int64_t dim, float* total) {
  auto add = [=](auto width) {
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
  };
  if (dim == 16) {
    add(std::integral_constant<int64_t, 16>());
  } else {
    add(dim);
  }
}

// Results: the scratch, of which there is no need here; the distinct rows, then "no row"; the sums of their gradients;
// their number.
ffi::Error Merge(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> scratch_in, ffi::Buffer<ffi::S32> row_in,
                 ffi::Buffer<ffi::F32> grad, ffi::ResultBuffer<ffi::S32> scratch_out,
                 ffi::ResultBuffer<ffi::S32> distinct_out, ffi::ResultBuffer<ffi::F32> total_out,
                 ffi::ResultBuffer<ffi::S32> count_out) {
  if (scratch_in.typed_data() != scratch_out->typed_data()) {
    return ffi::Error::Internal("the scratch was not given in place");
  }
  const int64_t lanes = row_in.element_count(), rows = scratch_in.element_count(), dim = grad.dimensions()[1];
  int32_t* distinct = distinct_out->typed_data();
  const int64_t number = std::clamp<int64_t>(lanes / dlrm::kLanesPerPiece, 1, kMergeParts);
  int32_t* lists = reinterpret_cast<int32_t*>(dlrm::Scratch<kMergeLists>(number * 3 * (lanes + 1)));
  Part parts[kMergeParts];
  dlrm::ParallelFor(pool, number, [&](int64_t i) {
    int32_t* own = lists + i * 3 * (lanes + 1);
    parts[i] = {own, own + lanes + 1, own + 2 * (lanes + 1), 0, 0};
    FindDistinct(row_in.typed_data(), lanes, rows, i, number, parts[i]);
  });
  int64_t first[kMergeParts + 1] = {};
  for (int64_t i = 0; i < number; ++i) first[i + 1] = first[i] + parts[i].count;
  dlrm::ParallelFor(pool, number, [&](int64_t i) {
    std::copy_n(parts[i].distinct, parts[i].count, distinct + first[i]);
    AddLanes(parts[i], grad.typed_data(), dim, total_out->typed_data() + first[i] * dim);
  });
  std::fill(distinct + first[number], distinct + distinct_out->element_count(), static_cast<int32_t>(rows));
  *count_out->typed_data() = first[number];
  return ffi::Error::Success();
}

auto RowsBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S32>>().RemainingArgs().RemainingRets();
}

auto MergeBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::S32>>()
      .Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsGather, Gather, RowsBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsScatter, Scatter, RowsBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsMerge, Merge, MergeBinding());
