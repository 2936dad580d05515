// The optimizers' rules, as dlrm_jax/optim has them under the same names, and what a row of numbers becomes by one.

#ifndef DLRM_JAX_NATIVE_RULES_H_
#define DLRM_JAX_NATIVE_RULES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace dlrm {

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
inline AdagradDecay::OfRow ForRow(const AdagradDecay& rule, float* const* at) {
  int32_t done;
  std::memcpy(&done, at[2], sizeof done);
  const bool is_due = rule.periods > done;
  done += is_due;
  std::memcpy(at[2], &done, sizeof done);
  return {rule, is_due};
}

template <typename Rule>
xla::ffi::Error SetNumbers(xla::ffi::Buffer<xla::ffi::U32> numbers, Rule& rule) {
  if (numbers.size_bytes() != sizeof rule) return xla::ffi::Error::Internal("these are not the numbers of the rule");
  std::memcpy(&rule, numbers.typed_data(), sizeof rule);
  return xla::ffi::Error::Success();
}

// Numbers that a rule sees at a time: a vector, or two.
constexpr int64_t kNumbers = 16;

// Some numbers of a row, no more than a rule sees at a time.
template <typename Rule, typename OfRow, typename Size>
void UpdateSome(const OfRow& of_row, float l2, Size some, const float* total, float* const* at, int64_t first) {
  float g[kNumbers] = {}, x[1 + Rule::kSlots][kNumbers] = {};  // where no writing can change what is yet to be read
  std::memcpy(g, total + first, some * sizeof(float));
  for (int t = 0; t <= Rule::kSlots; ++t) std::memcpy(x[t], at[t] + first, some * sizeof(float));
  for (int64_t i = 0; i < kNumbers; ++i) {
    g[i] += l2 * x[0][i];
    if constexpr (Rule::kSlots == 0) of_row(g[i], x[0][i]);
    if constexpr (Rule::kSlots == 1) of_row(g[i], x[0][i], x[1][i]);
    if constexpr (Rule::kSlots == 2) of_row(g[i], x[0][i], x[1][i], x[2][i]);
  }
  for (int t = 0; t <= Rule::kSlots; ++t) std::memcpy(at[t] + first, x[t], some * sizeof(float));
}

// A row of n numbers and its slots after the sum of its gradients, and l2 times itself.
template <typename Rule, typename Size>
void UpdateRow(const Rule& rule, float l2, Size n, const float* total, float* const* at) {
  const auto& of_row = ForRow(rule, at);
  int64_t first = 0;
  for (; first + kNumbers <= n; first += kNumbers) {
    UpdateSome<Rule>(of_row, l2, std::integral_constant<int64_t, kNumbers>(), total, at, first);
  }
  if (first < n) UpdateSome<Rule>(of_row, l2, n - first, total, at, first);
}

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_RULES_H_
