// A layer of the MLPs, relu(W^T h + b), forward and backward: matrix products with everything that is element-wise, and
// the moments for batch norm, done while a block is in the cache. Feature-major: activations are [features, examples].
//
// All products are one: C[m, 64] = A[m, k] B[k, 64], in words of 32 bits along k: one float, or two bfloat16 that meet
// in one instruction. A is row-major; B is a panel of 64 columns. What differs is how A and B are packed:
//   forward          C = y      A = W^T (packed once)   B = h, a panel of 64 examples
//   gradient of h    C = gh     A = W   (packed once)   B = g, a panel of 64 examples
//   gradient of W    C = gW     A = h, a slice          B = g^T, a panel of 64 features; sums over slices of examples
// A batch is cut into lanes of whole panels, and a thread does all of a lane, since what another core has just written is
// slow to read. What lanes share is summed as packing.h says: results do not depend on how many threads there are.

#include "dense_core.h"
#include "packing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

template <typename Stored, bool WithMoments>
void ForwardLane(const float* w, const float* b, const Stored* h, const float* weight, Stored* y, int64_t k, int64_t n,
                 int64_t examples, int64_t first, int64_t last, int64_t call, float* moments) {
  using T = Operand<Stored>;
  const int64_t words = WordsOf<T>(k);
  Word* a = Scratch<0>(RoundUp(n, Product<T>::kRowStep) * Stride(words));
  if (IsFirstOf(call)) PackTransposed<T>(w, k, n, 0, k, a);
  Word* packed = Scratch<1>(kPanel * words);
  float *sum = reinterpret_cast<float*>(Scratch<2>((2 * 16 + (last - first) * 2) * n)), *square = sum + 16 * n;
  float* of_panels = square + 16 * n;  // moments
  const Product<T> product;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t at = panel * kPanel;
    PackPanel<T>(h + at, examples, k, words, packed);
    ForRowsOfProduct(product, a, words, packed, n, [&](int64_t i, const float* c) {
      Activate<Stored, WithMoments>(c, b[i], weight + at, y + i * examples + at, sum + 16 * i, square + 16 * i);
    });
    if (WithMoments) SumRows(sum, 2 * n, of_panels + (panel - first) * 2 * n);
  }
  if (WithMoments) SumTerms(of_panels, last - first, 2 * n, 2 * n, moments);
}

template <typename T>
ffi::Error Forward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer bias, ffi::AnyBuffer h,
                   ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> sum,
                   ffi::Result<ffi::AnyBuffer> square, bool with_moments) {
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1], examples = h.dimensions()[1];
  const Lanes lanes = LanesOf(examples / kPanel, kLanes * std::max<int64_t>(1, pool.num_threads()));
  const int64_t call = NewCall(), sums = with_moments ? lanes.count() : 0;
  float* moments = reinterpret_cast<float*>(Scratch<6>(lanes.count() * 2 * n));
  ParallelFor(pool, lanes.count(), [&](int64_t lane) {
    auto* run = with_moments ? ForwardLane<T, true> : ForwardLane<T, false>;
    run(Data<float>(kernel), Data<float>(bias), Data<T>(h), Data<float>(weight), Data<T>(*y), k, n, examples,
        lanes.First(lane), lanes.First(lane + 1), call, moments + lane * 2 * n);
  });
  SumTerms(moments, sums, 2 * n, n, Data<float>(*sum));
  SumTerms(moments + n, sums, 2 * n, n, Data<float>(*square));
  return ffi::Error::Success();
}

template <typename T>
struct BackwardCall {
  const float *w, *weight, *gsum, *gsquare;
  const T *h, *y, *gy;
  T* gh;
  int64_t k, n, examples, call;
};

// The panels [first, last): gh, and what they add to the gradients of the kernel, for which there are SliceOf::Places, and of
// the bias.
template <typename Stored, bool WithMoments>
void BackwardLane(const BackwardCall<Stored>& in, int64_t first, int64_t last, float* gkernel, float* gbias) {
  using T = Operand<Stored>;
  const int64_t k = in.k, n = in.n, examples = in.examples, words = WordsOf<T>(n);
  const int64_t padded_k = RoundUp(k, Product<T>::kRowStep);
  Word* a = Scratch<0>(padded_k * Stride(words));  // W, in words along n
  if (IsFirstOf(in.call)) PackRows<T>(in.w, n, 0, k, a);
  Word* packed = Scratch<1>(kPanel * words);                        // g of a panel: words along n, examples
  float* sums = reinterpret_cast<float*>(Scratch<2>((16 + last - first) * n));  // gradient of the bias
  float* of_panels = sums + 16 * n;                                             // the same, of each
  Word* slice_h = Scratch<3>(padded_k * Stride(kSliceWords<T>));    // h of a slice: k, words along the examples
  Word* slice_g = Scratch<4>(RoundUp(n, kPanel) * kSliceWords<T>);  // g^T, by 64 features: words along the examples, n
  T* g = reinterpret_cast<T*>(Scratch<5>(RoundUp(n, 16) * kPanelWords<T>));  // the gradient before the ReLU, of a panel
  const Product<T> product;
  for (int64_t start = first; start < last; start += kSlicePanels) {
    const int64_t slice = std::min(kSlicePanels, last - start);
    for (int64_t i = 0; i < slice; ++i) {
      const int64_t example = (start + i) * kPanel;
      for (int64_t row = 0; row < n; ++row) {
        const int64_t at = row * examples + example;
        ReluGradient<Stored, T, WithMoments>(in.gy + at, in.y + at, in.weight + example, in.gsum[row], 2 * in.gsquare[row],
                                     g + row * kPanel, sums + 16 * row);
      }
      SumRows(sums, n, of_panels + (start + i - first) * n);
      PackPanel<T>(g, kPanel, n, words, packed);
      TransposePanel(g, n, i, slice_g, kSliceWords<T>);
      for (int64_t row = 0; row < k; ++row) {
        Word* to = slice_h + row * Stride(kSliceWords<T>) + i * kPanelWords<T>;
        CopyRow(in.h + row * examples + example, reinterpret_cast<T*>(to));
      }
      ForRowsOfProduct(product, a, words, packed, k, [&](int64_t row, const float* c) {
        ConvertRow(c, in.gh + row * examples + example);
      });
    }
    const SliceOf which{(start - first) / kSlicePanels, start + slice == last};
    KernelGradients(product, slice_h, slice_g, kSliceWords<T>, slice * kPanelWords<T>, k, n, which, gkernel);
  }
  SumTerms(of_panels, last - first, n, n, gbias);
}

template <typename T>
ffi::Error Backward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer h, ffi::AnyBuffer y, ffi::AnyBuffer gy,
                    ffi::AnyBuffer weight, ffi::AnyBuffer gsum, ffi::AnyBuffer gsquare,
                    ffi::Result<ffi::AnyBuffer> gkernel, ffi::Result<ffi::AnyBuffer> gbias,
                    ffi::Result<ffi::AnyBuffer> gh, bool with_moments) {
  const BackwardCall<T> in{
      Data<float>(kernel), Data<float>(weight), Data<float>(gsum), Data<float>(gsquare),
      Data<T>(h), Data<T>(y), Data<T>(gy), Data<T>(*gh),
      kernel.dimensions()[0], kernel.dimensions()[1], h.dimensions()[1], NewCall()};
  const Lanes lanes = GradientLanes(in.examples, std::max<int64_t>(1, pool.num_threads()));
  const int64_t size = in.k * in.n, of_lane = SliceOf::Places(lanes.slices()) * size;
  float* gkernels = reinterpret_cast<float*>(Scratch<6>(lanes.count() * (of_lane + in.n)));
  float* gbiases = gkernels + lanes.count() * of_lane;
  ParallelFor(pool, lanes.count(), [&](int64_t lane) {
    auto* run = with_moments ? BackwardLane<T, true> : BackwardLane<T, false>;
    run(in, lanes.First(lane), lanes.First(lane + 1), gkernels + lane * of_lane, gbiases + lane * in.n);
  });
  SumTerms(gbiases, lanes.count(), in.n, in.n, Data<float>(*gbias));
  SumKernelGradients(pool, gkernels, lanes.count(), of_lane, size, Data<float>(*gkernel));
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
