// A layer of the MLPs, relu(W^T h + b), forward and backward: matrix products with everything that is element-wise, and
// the moments for batch norm, done while a block is in the cache. Activations are [panels, features, 64 examples], so that
// a panel is one stretch of memory: with features as rows of a whole batch, each a power of two bytes long, the rows of a
// panel would share a few sets of the caches and each have a page of its own.
//
// All products are one: C[m, 64] = A[m, k] B[k, 64], in words of 32 bits along k: one float, or two bfloat16 that meet
// in one instruction. A is row-major; B is a panel of 64 columns. What differs is how A and B are packed:
//   forward          C = y      A = W^T                 B = h, a panel of 64 examples
//   gradient of h    C = gh     A = W                   B = g, a panel of 64 examples
//   gradient of W    C = gW     A = h, a slice          B = g^T, a panel of 64 features; sums over slices of examples
// A batch is cut into lanes of whole panels, and a thread does all of a lane. Sums over examples are made as packing.h says:
// results do not depend on how many threads there are.

#include "dense_core.h"
#include "packing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

// body(from, to) for all rows of W, by 64.
template <typename Body>
void ForRowsOfWeights(ffi::ThreadPool& pool, int64_t k, const Body& body) {
  ParallelFor(pool, Ceil(k, kPanel), [&](int64_t i) { body(i * kPanel, std::min(k, (i + 1) * kPanel)); });
}

template <typename Stored, bool WithMoments>
void ForwardLane(const Word* a, const float* b, const Stored* h, const float* weight, Stored* y, int64_t k, int64_t n,
                 int64_t first, int64_t last, float* moments) {
  using T = Operand<Stored>;
  const int64_t words = WordsOf<T>(k);
  Word* packed = Scratch<1>(kPanel * words);
  float *sum = reinterpret_cast<float*>(Scratch<2>((2 * 16 + (last - first) * 2) * n)), *square = sum + 16 * n;
  float* of_panels = square + 16 * n;  // moments
  const Product<T> product;
  for (int64_t panel = first; panel < last; ++panel) {
    const float* weights = weight + panel * kPanel;
    Stored* out = y + panel * n * kPanel;
    PackPanel<T>(h + panel * k * kPanel, kPanel, k, words, packed);
    ForRowsOfProduct(product, a, words, packed, n, [&](int64_t i, const float* c) {
      Activate<Stored, WithMoments>(c, b[i], weights, out + i * kPanel, sum + 16 * i, square + 16 * i);
    });
    if (WithMoments) SumRows(sum, 2 * n, of_panels + (panel - first) * 2 * n);
  }
  if (WithMoments) SumTerms(of_panels, last - first, 2 * n, 2 * n, moments);
}

template <typename Stored>
ffi::Error Forward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer bias, ffi::AnyBuffer h,
                   ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> sum,
                   ffi::Result<ffi::AnyBuffer> square, bool with_moments) {
  using T = Operand<Stored>;
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1], panels = h.dimensions()[0];
  Word* a = Scratch<0>(RoundUp(n, Product<T>::kRowStep) * Stride(WordsOf<T>(k)));
  ForRowsOfWeights(pool, k, [&](int64_t from, int64_t to) { PackTransposed<T>(Data<float>(kernel), k, n, from, to, a); });
  const Lanes lanes = LanesOf(panels, kLanes * std::max<int64_t>(1, pool.num_threads()));
  const int64_t sums = with_moments ? lanes.count() : 0;
  float* moments = reinterpret_cast<float*>(Scratch<6>(lanes.count() * 2 * n));
  ParallelFor(pool, lanes.count(), [&](int64_t lane) {
    auto* run = with_moments ? ForwardLane<Stored, true> : ForwardLane<Stored, false>;
    run(a, Data<float>(bias), Data<Stored>(h), Data<float>(weight), Data<Stored>(*y), k, n, lanes.First(lane),
        lanes.First(lane + 1), moments + lane * 2 * n);
  });
  SumTerms(moments, sums, 2 * n, n, Data<float>(*sum));
  SumTerms(moments + n, sums, 2 * n, n, Data<float>(*square));
  return ffi::Error::Success();
}

template <typename Stored>
struct BackwardCall {
  const float *weight, *gsum, *gsquare;
  const Stored *h, *y, *gy;
  Stored* gh;
  int64_t k, n;
  const Word* a;  // W, in words along n
  // Of a slice, for which there is room: h, [k, words of examples], and g^T, by 64 features.
  int64_t slice_words;
  Word *slice_h, *slice_g;
  float* gbiases;  // of each panel, [n]
};

// Some panels of a slice: gh, and what they add to the gradients of the bias and of the kernel.
template <typename Stored, bool WithMoments>
void BackwardLane(const BackwardCall<Stored>& in, const Slice& slice, int64_t first, int64_t last) {
  using T = Operand<Stored>;
  const int64_t k = in.k, n = in.n, words = WordsOf<T>(n);
  Word* packed = Scratch<1>(kPanel * words);                                 // g of a panel: words along n, examples
  float* sums = reinterpret_cast<float*>(Scratch<2>(16 * n));                // gradient of the bias
  T* g = reinterpret_cast<T*>(Scratch<3>(RoundUp(n, 16) * kPanelWords<T>));  // before the ReLU, of a panel
  const Product<T> product;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t in_slice = panel - slice.first;
    for (int64_t row = 0; row < n; ++row) {
      const int64_t at = (panel * n + row) * kPanel;
      ReluGradient<Stored, T, WithMoments>(in.gy + at, in.y + at, in.weight + panel * kPanel, in.gsum[row],
                                           2 * in.gsquare[row], g + row * kPanel, sums + 16 * row);
    }
    SumRows(sums, n, in.gbiases + panel * n);
    PackPanel<T>(g, kPanel, n, words, packed);
    TransposePanel(g, n, in_slice, in.slice_g, in.slice_words);
    for (int64_t row = 0; row < k; ++row) {
      Word* to = in.slice_h + row * Stride(in.slice_words) + in_slice * kPanelWords<T>;
      CopyRow(in.h + (panel * k + row) * kPanel, reinterpret_cast<T*>(to));
    }
    ForRowsOfProduct(product, in.a, words, packed, k, [&](int64_t row, const float* c) {
      ConvertRow(c, in.gh + (panel * k + row) * kPanel);
    });
  }
}

template <typename Stored>
ffi::Error Backward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer h, ffi::AnyBuffer y, ffi::AnyBuffer gy,
                    ffi::AnyBuffer weight, ffi::AnyBuffer gsum, ffi::AnyBuffer gsquare,
                    ffi::Result<ffi::AnyBuffer> gkernel, ffi::Result<ffi::AnyBuffer> gbias,
                    ffi::Result<ffi::AnyBuffer> gh, bool with_moments) {
  using T = Operand<Stored>;
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1];
  const int64_t padded_k = RoundUp(k, Product<T>::kRowStep);
  Word* a = Scratch<0>(padded_k * Stride(WordsOf<T>(n)));
  ForRowsOfWeights(pool, k, [&](int64_t from, int64_t to) { PackRows<T>(Data<float>(kernel), n, from, to, a); });
  const Slices slices(h.dimensions()[0], pool.num_threads());
  const Pieces pieces(k, n, slices.threads);
  const int64_t slice_words = slices.size * kPanelWords<T>;
  const BackwardCall<Stored> in{
      Data<float>(weight), Data<float>(gsum), Data<float>(gsquare),
      Data<Stored>(h), Data<Stored>(y), Data<Stored>(gy), Data<Stored>(*gh),
      k, n, a,
      slice_words, Scratch<4>(padded_k * Stride(slice_words)), Scratch<5>(RoundUp(n, kPanel) * slice_words),
      reinterpret_cast<float*>(Scratch<6>(slices.panels * n))};
  float* waiting = reinterpret_cast<float*>(Scratch<7>(slices.waiting() * k * n));
  auto* run = with_moments ? BackwardLane<Stored, true> : BackwardLane<Stored, false>;
  auto lane = [&](const Slice& slice, int64_t first, int64_t last) { run(in, slice, first, last); };
  ForSlices(pool, slices, lane, [&](const Slice& slice) {
    const int64_t words = (slice.last - slice.first) * kPanelWords<T>;
    ParallelFor(pool, pieces.count(), [&](int64_t piece) {
      KernelGradient(Product<T>(), in.slice_h, in.slice_g, slice_words, words, pieces, piece, slice, Data<float>(*gkernel),
                     waiting);
    });
  });
  SumTerms(in.gbiases, slices.panels, n, n, Data<float>(*gbias));
  return ffi::Error::Success();
}

auto ForwardBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<bool>("moments");
}

auto BackwardBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
      .Attr<bool>("moments");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmDenseForwardFloat, Forward<float>, ForwardBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmDenseBackwardFloat, Backward<float>, BackwardBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmDenseForwardBFloat16, Forward<dlrm::BFloat16>, ForwardBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmDenseBackwardBFloat16, Backward<dlrm::BFloat16>, BackwardBinding());
