// Work on elements that XLA does in one thread or in several passes: a transpose, and the moments of Adam.

#include <algorithm>
#include <cmath>
#include <vector>

#include "dense_core.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

constexpr int64_t kTile = 64;           // rows and columns that are transposed at a time
constexpr int64_t kElements = 1 << 14;  // of a leaf that are updated at a time

// out[columns, rows] <- in[rows, columns]: one tile, whose edges may be cut off.
template <typename In, typename Out>
void TransposeTile(const In* in, int64_t ld_in, int64_t rows, int64_t columns, Out* out, int64_t ld_out) {
  alignas(64) float wide[kTile * kTile], turned[kTile * kTile];
  if (rows < kTile || columns < kTile) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) out[c * ld_out + r] = Round<Out>(Widen(in[r * ld_in + c]));
    }
    return;
  }
  for (int64_t r = 0; r < kTile; ++r) ConvertRow(in + r * ld_in, wide + r * kTile);
  for (int64_t r = 0; r < kTile; r += 16) {
    for (int64_t c = 0; c < kTile; c += 16) {
      Transpose16(reinterpret_cast<const Word*>(wide) + r * kTile + c, kTile,
                  reinterpret_cast<Word*>(turned) + c * kTile + r, kTile);
    }
  }
  for (int64_t c = 0; c < kTile; ++c) ConvertRow(turned + c * kTile, out + c * ld_out);
}

template <typename In, typename Out>
ffi::Error Transpose(ffi::ThreadPool pool, ffi::AnyBuffer in, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = in.dimensions()[0], columns = in.dimensions()[1];
  const In* from = reinterpret_cast<const In*>(in.untyped_data());
  Out* to = reinterpret_cast<Out*>(out->untyped_data());
  const int64_t down = (rows + kTile - 1) / kTile, across = (columns + kTile - 1) / kTile;
  const bool by_rows = down > across;  // the longer side is what the threads share
  ParallelFor(pool, by_rows ? down : across, [&](int64_t i) {
    for (int64_t j = 0; j < (by_rows ? across : down); ++j) {
      const int64_t r = (by_rows ? i : j) * kTile, c = (by_rows ? j : i) * kTile;
      TransposeTile(from + r * columns + c, columns, std::min(kTile, rows - r), std::min(kTile, columns - c),
                    to + c * rows + r, rows);
    }
  });
  return ffi::Error::Success();
}

// rate1 is 1 - b1, rate2 1 - b2: taken here they would lose four digits. Arguments after alpha: the gradients of all
// leaves, their m, their v. Results: updates, m, v; the last two in place.
ffi::Error Adam(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> alpha_in, ffi::RemainingArgs args,
                ffi::RemainingRets results, float rate1, float rate2, float eps) {
  struct Piece {
    const float* __restrict grad;
    float *__restrict m, *__restrict v, *__restrict update;
    int64_t size;
  };
  const float alpha = *alpha_in.typed_data();
  const size_t leaves = results.size() / 3;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < leaves; ++i) {
    const auto in = [&](size_t place) { return args.get<ffi::Buffer<ffi::F32>>(place)->typed_data(); };
    const auto out = [&](size_t place) { return results.get<ffi::Buffer<ffi::F32>>(place).value()->typed_data(); };
    const int64_t size = args.get<ffi::Buffer<ffi::F32>>(i)->element_count();
    float *m = out(leaves + i), *v = out(2 * leaves + i);
    if (in(leaves + i) != m || in(2 * leaves + i) != v) return ffi::Error::Internal("m and v were not given in place");
    for (int64_t at = 0; at < size; at += kElements) {
      pieces.push_back({in(i) + at, m + at, v + at, out(i) + at, std::min(kElements, size - at)});
    }
  }
  ParallelFor(pool, pieces.size(), [&](int64_t i) {
    const Piece p = pieces[i];
    for (int64_t j = 0; j < p.size; ++j) {
      const float g = p.grad[j];
      p.m[j] += rate1 * (g - p.m[j]);
      p.v[j] += rate2 * (g * g - p.v[j]);
      p.update[j] = -alpha * p.m[j] / (std::sqrt(p.v[j]) + eps);
    }
  });
  return ffi::Error::Success();
}

auto TransposeBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>();
}

auto AdamBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs().RemainingRets()
      .Attr<float>("rate1").Attr<float>("rate2").Attr<float>("eps");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTransposeFloatFloat, (Transpose<float, float>), TransposeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTransposeFloatBFloat16, (Transpose<float, dlrm::BFloat16>), TransposeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTransposeBFloat16Float, (Transpose<dlrm::BFloat16, float>), TransposeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmAdam, Adam, AdamBinding());
