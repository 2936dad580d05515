// A layer of the MLPs, relu(W^T h + b), forward and backward: matrix products with everything that is element-wise, and
// the moments for batch norm, done while a block is in the cache. Feature-major: activations are [features, examples].
//
// All products are one: C[m, 64] = A[m, k] B[k, 64], in words of 32 bits along k: one float, or two bfloat16 that meet
// in one instruction. A is row-major; B is a panel of 64 columns. What differs is how A and B are packed:
//   forward          C = y      A = W^T                 B = h, a panel of 64 examples
//   gradient of h    C = gh     A = W                   B = g, a panel of 64 examples
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

// body(from, to) for all rows of W, by 64.
template <typename Body>
void ForRowsOfWeights(ffi::ThreadPool& pool, int64_t k, const Body& body) {
  ParallelFor(pool, Ceil(k, kPanel), [&](int64_t i) { body(i * kPanel, std::min(k, (i + 1) * kPanel)); });
}

template <typename Stored, bool WithMoments>
void ForwardLane(const Word* a, const float* b, const Stored* h, const float* weight, Stored* y, int64_t k, int64_t n,
                 int64_t examples, int64_t first, int64_t last, float* moments) {
  using T = Operand<Stored>;
  const int64_t words = WordsOf<T>(k);
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

template <typename Stored>
ffi::Error Forward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer bias, ffi::AnyBuffer h,
                   ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> sum,
                   ffi::Result<ffi::AnyBuffer> square, bool with_moments) {
  using T = Operand<Stored>;
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1], examples = h.dimensions()[1];
  Word* a = Scratch<0>(RoundUp(n, Product<T>::kRowStep) * Stride(WordsOf<T>(k)));
  ForRowsOfWeights(pool, k, [&](int64_t from, int64_t to) { PackTransposed<T>(Data<float>(kernel), k, n, from, to, a); });
  const Lanes lanes = LanesOf(examples / kPanel, kLanes * std::max<int64_t>(1, pool.num_threads()));
  const int64_t sums = with_moments ? lanes.count() : 0;
  float* moments = reinterpret_cast<float*>(Scratch<6>(lanes.count() * 2 * n));
  ParallelFor(pool, lanes.count(), [&](int64_t lane) {
    auto* run = with_moments ? ForwardLane<Stored, true> : ForwardLane<Stored, false>;
    run(a, Data<float>(bias), Data<Stored>(h), Data<float>(weight), Data<Stored>(*y), k, n, examples, lanes.First(lane),
        lanes.First(lane + 1), moments + lane * 2 * n);
  });
  SumTerms(moments, sums, 2 * n, n, Data<float>(*sum));
  SumTerms(moments + n, sums, 2 * n, n, Data<float>(*square));
  return ffi::Error::Success();
}

template <typename T>
struct BackwardCall {
  const float *weight, *gsum, *gsquare;
  const T *h, *y, *gy;
  T* gh;
  int64_t k, n, examples;
  Cut cut;
  const Word* a;  // W, in words along n
};

// What a slice holds for the gradient of the kernel: words along its examples.
struct SliceMemory {
  int64_t words;
  Word* h;  // [k, words]
  Word* g;  // g^T, by 64 features: [words, 64]

  template <typename T>
  static SliceMemory Of(const BackwardCall<T>& in) {
    const int64_t words = in.cut.slice_panels * kPanelWords<Operand<T>>;
    return {words, Scratch<3>(RoundUp(in.k, Product<Operand<T>>::kRowStep) * Stride(words)),
            Scratch<4>(RoundUp(in.n, kPanel) * words)};
  }
};

// The panels [first, last): gh, and what they add to the gradients of the bias and, where lanes have slices of their own, of
// the kernel, for which there are SliceOf::Places.
template <typename Stored, bool WithMoments>
void BackwardLane(const BackwardCall<Stored>& in, const SliceMemory& memory, int64_t first, int64_t last, float* gkernel,
                  float* gbias) {
  using T = Operand<Stored>;
  const int64_t k = in.k, n = in.n, examples = in.examples, words = WordsOf<T>(n);
  Word* packed = Scratch<1>(kPanel * words);                                    // g of a panel: words along n, examples
  float* sums = reinterpret_cast<float*>(Scratch<2>((16 + last - first) * n));  // gradient of the bias
  float* of_panels = sums + 16 * n;                                             // the same, of each
  T* g = reinterpret_cast<T*>(Scratch<5>(RoundUp(n, 16) * kPanelWords<T>));     // before the ReLU, of a panel
  const Product<T> product;
  for (int64_t start = first; start < last; start += kSlicePanels) {
    const int64_t slice = std::min(kSlicePanels, last - start);
    for (int64_t i = 0; i < slice; ++i) {
      const int64_t example = (start + i) * kPanel, in_slice = in.cut.is_slice ? start + i : i;
      for (int64_t row = 0; row < n; ++row) {
        const int64_t at = row * examples + example;
        ReluGradient<Stored, T, WithMoments>(in.gy + at, in.y + at, in.weight + example, in.gsum[row], 2 * in.gsquare[row],
                                     g + row * kPanel, sums + 16 * row);
      }
      SumRows(sums, n, of_panels + (start + i - first) * n);
      PackPanel<T>(g, kPanel, n, words, packed);
      TransposePanel(g, n, in_slice, memory.g, memory.words);
      for (int64_t row = 0; row < k; ++row) {
        Word* to = memory.h + row * Stride(memory.words) + in_slice * kPanelWords<T>;
        CopyRow(in.h + row * examples + example, reinterpret_cast<T*>(to));
      }
      ForRowsOfProduct(product, in.a, words, packed, k, [&](int64_t row, const float* c) {
        ConvertRow(c, in.gh + row * examples + example);
      });
    }
    if (in.cut.is_slice) continue;  // all lanes together make the gradient of its kernel
    const SliceOf which{(start - first) / kSlicePanels, start + slice == last};
    KernelGradients(product, memory.h, memory.g, memory.words, slice * kPanelWords<T>, k, n, which, gkernel);
  }
  SumTerms(of_panels, last - first, n, n, gbias);
}

template <typename Stored>
ffi::Error Backward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer h, ffi::AnyBuffer y, ffi::AnyBuffer gy,
                    ffi::AnyBuffer weight, ffi::AnyBuffer gsum, ffi::AnyBuffer gsquare,
                    ffi::Result<ffi::AnyBuffer> gkernel, ffi::Result<ffi::AnyBuffer> gbias,
                    ffi::Result<ffi::AnyBuffer> gh, bool with_moments) {
  using T = Operand<Stored>;
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1], examples = h.dimensions()[1];
  Word* a = Scratch<0>(RoundUp(k, Product<T>::kRowStep) * Stride(WordsOf<T>(n)));
  ForRowsOfWeights(pool, k, [&](int64_t from, int64_t to) { PackRows<T>(Data<float>(kernel), n, from, to, a); });
  const Cut cut = CutOf(examples, std::max<int64_t>(1, pool.num_threads()), GradientPieces(k, n));
  const BackwardCall<Stored> in{
      Data<float>(weight), Data<float>(gsum), Data<float>(gsquare),
      Data<Stored>(h), Data<Stored>(y), Data<Stored>(gy), Data<Stored>(*gh), k, n, examples, cut, a};
  const Lanes& lanes = cut.lanes;
  const int64_t of_lane = cut.is_slice ? 0 : SliceOf::Places(lanes.slices()) * k * n;
  float* gkernels = reinterpret_cast<float*>(Scratch<6>(lanes.count() * (of_lane + n)));
  float* gbiases = gkernels + lanes.count() * of_lane;
  const SliceMemory shared = SliceMemory::Of(in);
  ParallelFor(pool, lanes.count(), [&](int64_t lane) {
    auto* run = with_moments ? BackwardLane<Stored, true> : BackwardLane<Stored, false>;
    run(in, cut.is_slice ? shared : SliceMemory::Of(in), lanes.First(lane), lanes.First(lane + 1), gkernels + lane * of_lane,
        gbiases + lane * n);
  });
  SumTerms(gbiases, lanes.count(), n, n, Data<float>(*gbias));
  if (cut.is_slice) {
    ParallelFor(pool, GradientPieces(k, n), [&](int64_t i) {
      KernelGradient(Product<T>(), shared.h, shared.g, shared.words, shared.words, k, n, i, {0, true}, Data<float>(*gkernel));
    });
  } else {
    SumKernelGradients(pool, gkernels, lanes.count(), of_lane, k * n, Data<float>(*gkernel));
  }
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
