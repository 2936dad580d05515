// A training step of table rows in one pass: equal rows merge, and an optimizer's rule changes each row and its slots in
// place, by the thread that has just added up its gradient. Rules and their names are those of dlrm_jax/optim.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "merging.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

// A rule is its numbers, in the order in which Python gives them, and what becomes of a number of the table, w, and of
// those of its slots, by the gradient g. new1 is 1 - b1, which in float is another number.

struct GradientDescent {
  static constexpr int kSlots = 0;
  float rate;

  void operator()(float g, float& w) const { w -= rate * g; }
};

struct Adagrad {
  static constexpr int kSlots = 1;
  float rate;

  void operator()(float g, float& w, float& a) const {
    a += g * g;
    w -= rate * g / std::sqrt(a);
  }
};

struct Adam {
  static constexpr int kSlots = 2;
  float rate, new1, new2, eps;

  void operator()(float g, float& w, float& m, float& v) const {
    m += new1 * (g - m);
    v += new2 * (g * g - v);
    w -= rate * m / (std::sqrt(v) + eps);
  }
};

struct AdamAsync {
  static constexpr int kSlots = 2;
  float rate, b1, new1, b2, new2, eps;

  void operator()(float g, float& w, float& m, float& v) const {
    v = b2 * v + new2 * g * g;
    m = b1 * m + new1 * g;
    w -= rate * m / (std::sqrt(v) + eps);
  }
};

struct RmsProp {
  static constexpr int kSlots = 2;
  float rate, b1, new1, b2, new2, eps;

  void operator()(float g, float& w, float& m, float& v) const {
    v = b2 * v + new2 * g * g;
    m = b1 * m + rate * g / std::sqrt(v + eps);
    w -= m;
  }
};

// Has one number a row besides, in the last table: the periods by which the row has been discounted.
struct AdagradDecay {
  static constexpr int kSlots = 1;
  Adagrad adagrad;
  float least, decay;
  int32_t periods;  // that have passed

  struct OfRow {
    const AdagradDecay& rule;
    bool is_due;

    void operator()(float g, float& w, float& a) const {
      a = is_due ? std::max(rule.decay * a, rule.least) : a;
      rule.adagrad(g, w, a);
    }
  };
};

template <typename Rule>
constexpr size_t kTables = 1 + Rule::kSlots;
template <>
constexpr size_t kTables<AdagradDecay> = 3;

// The rule of a row, which stands at these places in the tables.
template <typename Rule>
const Rule& ForRow(const Rule& rule, float* const*) {
  return rule;
}
AdagradDecay::OfRow ForRow(const AdagradDecay& rule, float* const* at) {
  int32_t done;
  std::memcpy(&done, at[2], sizeof done);
  const bool is_due = rule.periods > done;
  done += is_due;
  std::memcpy(at[2], &done, sizeof done);
  return {rule, is_due};
}

// Numbers that a rule sees at a time: a vector, or two.
constexpr int64_t kBlock = 16;

// A row of n numbers and its slots after the sum of its gradients, and l2 times itself.
template <typename Rule, typename Size>
void UpdateRow(const Rule& rule, float l2, Size n, const float* total, float* const* at) {
  const auto& of_row = ForRow(rule, at);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t some = std::min<int64_t>(kBlock, n - first);
    float g[kBlock] = {}, x[1 + Rule::kSlots][kBlock] = {};  // where no writing can change what is yet to be read
    std::memcpy(g, total + first, some * sizeof(float));
    for (int t = 0; t <= Rule::kSlots; ++t) std::memcpy(x[t], at[t] + first, some * sizeof(float));
    for (int64_t i = 0; i < kBlock; ++i) {
      g[i] += l2 * x[0][i];
      if constexpr (Rule::kSlots == 0) of_row(g[i], x[0][i]);
      if constexpr (Rule::kSlots == 1) of_row(g[i], x[0][i], x[1][i]);
      if constexpr (Rule::kSlots == 2) of_row(g[i], x[0][i], x[1][i], x[2][i]);
    }
    for (int t = 0; t <= Rule::kSlots; ++t) std::memcpy(at[t] + first, x[t], some * sizeof(float));
  }
}

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
  Rule rule;
  if (numbers.size_bytes() != sizeof rule || tables.size() != kTables<Rule>) {
    return ffi::Error::Internal("these are not the numbers and slots of the rule");
  }
  std::memcpy(&rule, numbers.typed_data(), sizeof rule);
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
