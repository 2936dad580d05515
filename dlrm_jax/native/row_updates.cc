// A training step of table rows in one pass: equal rows merge, and an optimizer's rule changes each row and its slots in
// place, by the thread that has just added up its gradient.

#include <cstdint>
#include <cstring>
#include <vector>

#include "merging.h"
#include "parallel.h"
#include "rules.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

constexpr int kLists = 103;         // of the uses of memory that a thread keeps
constexpr int64_t kRowsAhead = 16;          // of each table
constexpr int64_t kFew = 1 << 14;           // lanes whose rows and slots stay in the second-level cache

// The part `which` of the lanes. The rows of few are asked for as soon as they are known.
template <typename Rule>
void UpdatePart(const Rule& rule, float l2, const int32_t* row, int64_t lanes, const float* grad, int64_t dim, int64_t leaf,
                int64_t which, int64_t parts, const std::vector<Rows>& tables) {
  auto ask = [&](int32_t row) {
    for (const Rows& table : tables) Prefetch<true>(table.At(row), table.bytes);
  };
  uint32_t* memory = Scratch<kLists>(Part::Words(lanes));
  const auto found = [&](int32_t row, const Part& part) {
    if (part.lanes < kFew) ask(row);
  };
  const Part part = FindDistinct(row, lanes, tables[0].rows, leaf, which, parts, memory, found);
  ForSums(part, grad, dim, [&](int64_t place, const float* sum, auto n) {
    if (place + kRowsAhead < part.rows) ask(part.row[place + kRowsAhead].number);
    float* at[kTables<Rule>];
    for (size_t t = 0; t < kTables<Rule>; ++t) at[t] = reinterpret_cast<float*>(tables[t].At(part.row[place].number));
    UpdateRow(rule, l2, n, sum, at);
  });
}

// Arguments after `numbers`, the rule's in so many words, and l2: the value and the slots. Results: the same, in place.
template <typename Rule>
ffi::Error Update(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> row, ffi::Buffer<ffi::F32> grad,
                  ffi::Buffer<ffi::U32> numbers, ffi::Buffer<ffi::F32> l2, ffi::RemainingArgs args,
                  ffi::RemainingRets results, int64_t leaf) {
  std::vector<Rows> tables;
  if (ffi::Error error = AddTablesInPlace(args, results, tables); error.failure()) return error;
  if (tables.size() != kTables<Rule>) return ffi::Error::Internal("these are not the slots of the rule");
  Rule rule;
  if (ffi::Error error = SetNumbers(numbers, rule); error.failure()) return error;
  const int64_t lanes = row.element_count(), parts = MergersOf(lanes);
  ParallelFor(pool, parts, [&](int64_t i) {
    UpdatePart(rule, *l2.typed_data(), row.typed_data(), lanes, grad.typed_data(), grad.dimensions()[1], leaf, i, parts,
               tables);
  });
  return ffi::Error::Success();
}

auto UpdateBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::U32>>().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs().RemainingRets().Attr<int64_t>("leaf");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsGradientDescent, Update<GradientDescent>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsAdagrad, Update<Adagrad>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsAdagradDecay, Update<AdagradDecay>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsAdam, Update<Adam>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsAdamAsync, Update<AdamAsync>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmRowsRmsProp, Update<RmsProp>, UpdateBinding());
