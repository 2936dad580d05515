// Row kernels of a table: merge of the lanes of a batch, gather and scatter of rows. See rows.py for what they promise.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
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

constexpr int kMergeScratch = 100;  // of the uses of memory that a thread keeps

struct Lane {
  int32_t lane, place;
};

void AddLanes(const Lane* lanes, int64_t count, const float* grad, int64_t dim, float* total) {
  auto add = [=](auto width) {
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) Prefetch<false>(grad + lanes[i + kAhead].lane * width, width * sizeof(float));
      const float* from = grad + lanes[i].lane * width;
      float* to = total + lanes[i].place * width;
      for (int64_t j = 0; j < width; ++j) to[j] += from[j];
    }
  };
  if (dim == 16) {
    add(std::integral_constant<int64_t, 16>());
  } else {
    add(dim);
  }
}

// The scratch says at which place of `distinct` a row stands, but only where `distinct` agrees: it is never cleared.
// Results: the scratch, in place; the distinct rows, then "no row"; the sums of their gradients; their number.
ffi::Error Merge(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> scratch_in, ffi::Buffer<ffi::S32> row_in,
                 ffi::Buffer<ffi::F32> grad, ffi::ResultBuffer<ffi::S32> scratch_out,
                 ffi::ResultBuffer<ffi::S32> distinct_out, ffi::ResultBuffer<ffi::F32> total_out,
                 ffi::ResultBuffer<ffi::S32> count_out) {
  if (scratch_in.typed_data() != scratch_out->typed_data()) {
    return ffi::Error::Internal("the scratch was not given in place");
  }
  const int64_t lanes = row_in.element_count(), rows = scratch_in.element_count(), dim = grad.dimensions()[1];
  const int32_t* row = row_in.typed_data();
  int32_t *scratch = scratch_out->typed_data(), *distinct = distinct_out->typed_data();
  float* total = total_out->typed_data();

  // A part is a list of lanes whose rows no other part has, in the order of the batch: so every sum is in that order.
  const int64_t parts = dlrm::PartsOf(pool, lanes);
  Lane* list = reinterpret_cast<Lane*>(dlrm::Scratch<kMergeScratch>(parts * lanes * 2));
  int64_t length[dlrm::kMostParts] = {};
  int32_t count = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int32_t ahead = lane + kAhead < lanes ? row[lane + kAhead] : -1;
    if (InTable(ahead, rows)) Prefetch<true>(scratch + ahead, sizeof(int32_t));
    if (!InTable(row[lane], rows)) continue;
    int32_t place = scratch[row[lane]];
    if (place < 0 || place >= count || distinct[place] != row[lane]) {
      place = scratch[row[lane]] = count++;
      distinct[place] = row[lane];
    }
    const int64_t part = place % parts;
    list[part * lanes + length[part]++] = {static_cast<int32_t>(lane), place};
  }
  *count_out->typed_data() = count;
  std::fill(distinct + count, distinct + distinct_out->element_count(), static_cast<int32_t>(rows));
  std::memset(total, 0, count * dim * sizeof(float));
  dlrm::ParallelFor(pool, parts, [&](int64_t part) {
    AddLanes(list + part * lanes, length[part], grad.typed_data(), dim, total);
  });
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
