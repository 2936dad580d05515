// Row kernels of a table: merge of the lanes of a batch, gather and scatter of rows. See rows.py for what they promise.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "merging.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

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
  const int64_t lanes = row.element_count(), pieces = PiecesOf(pool, lanes);
  ParallelFor(pool, pieces, [&](int64_t piece) {
    for (size_t i = 0; i < tables.size(); ++i) {
      GatherRows(tables[i], row.typed_data(), piece * lanes / pieces, (piece + 1) * lanes / pieces, outs[i].data);
    }
  });
  return ffi::Error::Success();
}

// Arguments after `row`: the tables, then the new rows of each. Results: the tables, in place.
ffi::Error Scatter(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> row, ffi::RemainingArgs args, ffi::RemainingRets results) {
  std::vector<Rows> tables, ins;
  if (ffi::Error error = AddTablesInPlace(args, results, tables); error.failure()) return error;
  for (size_t i = 0; i < results.size(); ++i) ins.emplace_back(*args.get<ffi::AnyBuffer>(results.size() + i));
  const int64_t lanes = row.element_count(), pieces = PiecesOf(pool, lanes);
  ParallelFor(pool, pieces, [&](int64_t piece) {
    for (size_t i = 0; i < tables.size(); ++i) {
      ScatterRows(tables[i], row.typed_data(), piece * lanes / pieces, (piece + 1) * lanes / pieces, ins[i].data);
    }
  });
  return ffi::Error::Success();
}

constexpr int kListsOfParts = 100;  // of the uses of memory that a thread keeps

// Results: the scratch, of which there is no need here; the distinct rows, then "no row"; the sums of their gradients;
// their number.
ffi::Error Merge(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> scratch_in, ffi::Buffer<ffi::S32> row_in,
                 ffi::Buffer<ffi::F32> grad, ffi::ResultBuffer<ffi::S32> scratch_out,
                 ffi::ResultBuffer<ffi::S32> distinct_out, ffi::ResultBuffer<ffi::F32> total_out,
                 ffi::ResultBuffer<ffi::S32> count_out, int64_t leaf) {
  if (scratch_in.typed_data() != scratch_out->typed_data()) {
    return ffi::Error::Internal("the scratch was not given in place");
  }
  const int64_t lanes = row_in.element_count(), rows = scratch_in.element_count(), dim = grad.dimensions()[1];
  int32_t* distinct = distinct_out->typed_data();
  const int64_t number = MergersOf(lanes);
  uint32_t* memory = Scratch<kListsOfParts>(number * Part::Words(lanes));
  Part parts[kMostMergers];
  ParallelFor(pool, number, [&](int64_t i) {
    uint32_t* own = memory + i * Part::Words(lanes);
    parts[i] = FindDistinct(row_in.typed_data(), lanes, rows, leaf, i, number, own, [](int32_t, const Part&) {});
  });
  int64_t first[kMostMergers + 1] = {};
  for (int64_t i = 0; i < number; ++i) first[i + 1] = first[i] + parts[i].rows;
  ParallelFor(pool, number, [&](int64_t i) {
    ForSums(parts[i], grad.typed_data(), dim, [&](int64_t place, const float* sum, auto n) {
      distinct[first[i] + place] = parts[i].row[place].number;
      std::copy_n(sum, +n, total_out->typed_data() + (first[i] + place) * n);
    });
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
      .Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>().Attr<int64_t>("leaf");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsGather, Gather, RowsBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsScatter, Scatter, RowsBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsMerge, Merge, MergeBinding());
