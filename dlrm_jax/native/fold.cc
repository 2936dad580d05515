// Batch norm's scale and shift put into the layer after it, and the gradients back: W' = scale W by rows, b' = b + shift W.
// XLA makes the same of five passes over W, each on one thread.

#include <algorithm>
#include <cstdint>

#include "dense_core.h"
#include "packing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

constexpr int kFoldSums = 30;      // of the uses of memory of a thread
constexpr int64_t kRows = 32;      // of W that a thread takes at a time, whatever the threads are: so sums have the same bits
constexpr int64_t kTogether = 16;  // what makes up a sum over a row

// body(which, first row, last row) for all of k rows.
template <typename Body>
void ForRows(ffi::ThreadPool& pool, int64_t k, const Body& body) {
  ParallelFor(pool, Ceil(k, kRows), [&](int64_t i) { body(i, i * kRows, std::min(k, (i + 1) * kRows)); });
}

ffi::Error Fold(ffi::ThreadPool pool, Floats kernel, Floats bias, Floats scale, Floats shift, FloatsOut out,
                FloatsOut out_bias) {
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1];
  float* sums = reinterpret_cast<float*>(Scratch<kFoldSums>(Ceil(k, kRows) * n));  // shift W, of some rows
  ForRows(pool, k, [&](int64_t which, int64_t first, int64_t last) {
    float* sum = sums + which * n;
    std::fill_n(sum, n, 0.f);
    for (int64_t row = first; row < last; ++row) {
      const float* w = kernel.typed_data() + row * n;
      const float by = scale.typed_data()[row], add = shift.typed_data()[row];
      float* to = out->typed_data() + row * n;
      for (int64_t i = 0; i < n; ++i) {
        to[i] = by * w[i];
        sum[i] += add * w[i];
      }
    }
  });
  SumTerms(sums, Ceil(k, kRows), n, n, out_bias->typed_data());
  AddTo(out_bias->typed_data(), bias.typed_data(), n);
  return ffi::Error::Success();
}

// By the gradients of W' and b': those of W, scale and shift. That of b is that of b'.
ffi::Error FoldBackward(ffi::ThreadPool pool, Floats kernel, Floats scale, Floats shift, Floats gout, Floats gbias,
                        FloatsOut gkernel, FloatsOut gscale, FloatsOut gshift) {
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1];
  ForRows(pool, k, [&](int64_t, int64_t first, int64_t last) {
    alignas(64) float scales[kRows * kTogether] = {}, shifts[kRows * kTogether] = {};
    for (int64_t row = first; row < last; ++row) {
      const float *w = kernel.typed_data() + row * n, *g = gout.typed_data() + row * n, *b = gbias.typed_data();
      const float by = scale.typed_data()[row], add = shift.typed_data()[row];
      float *to = gkernel->typed_data() + row * n, *of_scale = scales + (row - first) * kTogether;
      float* of_shift = shifts + (row - first) * kTogether;
      auto some = [&](int64_t i, auto count) {
        for (int64_t j = 0; j < count; ++j) {
          of_scale[j] += g[i + j] * w[i + j];
          of_shift[j] += b[i + j] * w[i + j];
          to[i + j] = by * g[i + j] + add * b[i + j];
        }
      };
      int64_t i = 0;
      for (; i + kTogether <= n; i += kTogether) some(i, std::integral_constant<int64_t, kTogether>());
      some(i, n - i);
    }
    SumRows(scales, last - first, gscale->typed_data() + first);
    SumRows(shifts, last - first, gshift->typed_data() + first);
  });
  return ffi::Error::Success();
}

auto FoldBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
      .Ret<Floats>().Ret<Floats>();
}

auto FoldBackwardBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
      .Ret<Floats>().Ret<Floats>().Ret<Floats>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmFold, Fold, FoldBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmFoldBackward, FoldBackward, FoldBackwardBinding());
