// A training step of the network's parameters in one pass: an optimizer's rule changes each number and its slots in place.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "rules.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

constexpr int64_t kPiece = 1 << 13;  // numbers that a thread changes at a time

template <typename Rule>
constexpr bool kCountsRows = kTables<Rule> > 1 + Rule::kSlots;

// Some rows of a parameter; where the rule counts nothing by row, each of its numbers is one.
struct Piece {
  size_t parameter;
  int64_t first, last;
};

// Arguments after `numbers`, the rule's in so many words: the gradient by each parameter; then each parameter, each one's
// first slot, and so on. Results: all but the gradients, in place.
template <typename Rule>
ffi::Error Update(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> numbers, ffi::RemainingArgs args, ffi::RemainingRets results) {
  Rule rule;
  if (ffi::Error error = SetNumbers(numbers, rule); error.failure()) return error;
  const size_t parameters = args.size() / (1 + kTables<Rule>);
  for (size_t i = 0; i < results.size(); ++i) {
    if (args.get<ffi::AnyBuffer>(parameters + i)->untyped_data() != (*results.get<ffi::AnyBuffer>(i))->untyped_data()) {
      return ffi::Error::Internal("a parameter was not given in place");
    }
  }
  auto table = [&](size_t parameter, size_t t) { return **results.get<ffi::AnyBuffer>(t * parameters + parameter); };
  auto width = [&](size_t parameter) -> int64_t {
    const int64_t size = table(parameter, 0).element_count();
    return kCountsRows<Rule> && size ? size / table(parameter, kTables<Rule> - 1).element_count() : 1;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < parameters; ++i) {
    const int64_t rows = table(i, 0).element_count() / width(i), step = std::max<int64_t>(1, kPiece / width(i));
    for (int64_t first = 0; first < rows; first += step) pieces.push_back({i, first, std::min(rows, first + step)});
  }
  ParallelFor(pool, pieces.size(), [&](int64_t i) {
    const auto [parameter, first, last] = pieces[i];
    const int64_t n = width(parameter);
    const float* g = static_cast<const float*>((*args.get<ffi::AnyBuffer>(parameter)).untyped_data());
    float* at[kTables<Rule>];
    for (size_t t = 0; t < kTables<Rule>; ++t) at[t] = static_cast<float*>(table(parameter, t).untyped_data());
    auto update = [&](int64_t row, int64_t size) {
      float* here[kTables<Rule>];
      for (size_t t = 0; t <= Rule::kSlots; ++t) here[t] = at[t] + row * n;
      if constexpr (kCountsRows<Rule>) here[1 + Rule::kSlots] = at[1 + Rule::kSlots] + row;
      UpdateRow(rule, 0.f, size, g + row * n, here);
    };
    if (!kCountsRows<Rule>) return update(first, last - first);
    for (int64_t row = first; row < last; ++row) update(row, n);
  });
  return ffi::Error::Success();
}

auto UpdateBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::U32>>().RemainingArgs().RemainingRets();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmParametersGradientDescent, Update<GradientDescent>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmParametersAdagrad, Update<Adagrad>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmParametersAdagradDecay, Update<AdagradDecay>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmParametersAdam, Update<Adam>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmParametersAdamAsync, Update<AdamAsync>, UpdateBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmParametersRmsProp, Update<RmsProp>, UpdateBinding());
