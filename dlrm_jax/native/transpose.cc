// The transpose of a matrix, from and to float32 and bfloat16, on all threads: XLA's takes one, element by element.

#include <algorithm>

#include "dense_core.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

constexpr int64_t kTile = 64;  // rows and columns that are transposed at a time

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

auto TransposeBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTransposeFloatFloat, (Transpose<float, float>), TransposeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTransposeFloatBFloat16, (Transpose<float, dlrm::BFloat16>), TransposeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTransposeBFloat16Float, (Transpose<dlrm::BFloat16, float>), TransposeBinding());
