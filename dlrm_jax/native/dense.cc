// A layer of the MLPs, relu(W^T h + b), forward and backward: matrix products with everything that is element-wise, and
// the moments for batch norm, done while a block is in the cache. Feature-major: activations are [features, examples].
//
// All products are one: C[m, 64] = A[m, k] B[k, 64], in words of 32 bits along k: one float, or two bfloat16 that meet
// in one instruction. A is row-major; B is a panel of 64 columns. What differs is how A and B are packed:
//   forward          C = y      A = W^T (packed once)   B = h, a panel of 64 examples
//   gradient of h    C = gh     A = W   (packed once)   B = g, a panel of 64 examples
//   gradient of W    C = gW     A = h, a slice          B = g^T, a panel of 64 features; sums over slices of examples
// Sums do not depend on the number of threads: what runs in parallel writes to places of its own, added up in order.

#include "dense_core.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

constexpr int64_t kPanel = 64;   // columns of a panel: examples, or features of g^T
constexpr int64_t kSlice = 512;  // examples of a slice: its h and g^T stay in the second-level cache
constexpr int64_t kSlicePanels = kSlice / kPanel;
constexpr int64_t kBlock = 96;  // rows of C that a thread makes at a time: a multiple of 6 and of 32

template <typename T>
constexpr int64_t kPerWord = sizeof(Word) / sizeof(T);

int64_t Ceil(int64_t n, int64_t step) { return (n + step - 1) / step; }

template <typename T>
T* Data(ffi::AnyBuffer buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

template <typename T>
int64_t WordsOf(int64_t elements) {
  return RoundUp(Ceil(elements, kPerWord<T>), Product<T>::kWordStep);
}

// out[row of 64 examples, kPerWord rows of in to a word] <- in[rows, 64 of ld examples]; rows past the end are zero.
template <typename T>
void PackPanel(const T* in, int64_t ld, int64_t rows, int64_t words, Word* out) {
  static const T zeros[kPanel] = {};
  for (int64_t w = 0; w < words; ++w, out += kPanel) {
    const T* rows_in[kPerWord<T>];
    for (int64_t i = 0; i < kPerWord<T>; ++i) {
      const int64_t row = w * kPerWord<T> + i;
      rows_in[i] = row < rows ? in + row * ld : zeros;
    }
    Interleave(rows_in, out);
  }
}

// out[N, words of K] <- W^T: up to 64 rows of it, those from n0 on. What is past the end of K is zero.
template <typename T>
void PackTransposed(const float* kernel, int64_t k, int64_t n, int64_t n0, int64_t words, Word* out) {
  const int64_t columns = std::min(kPanel, n - n0);
  for (int64_t w0 = 0; w0 < words; w0 += 16) {
    const int64_t width = std::min<int64_t>(16, words - w0);
    alignas(64) Word block[16][kPanel] = {};
    for (int64_t w = 0; w < width; ++w) {
      T rows[kPerWord<T>][kPanel] = {};
      const T* row_of[kPerWord<T>];
      for (int64_t i = 0; i < kPerWord<T>; ++i) {
        const int64_t row = (w0 + w) * kPerWord<T> + i;
        if (row < k) RoundRow(kernel + row * n + n0, columns, rows[i], kPanel);
        row_of[i] = rows[i];
      }
      Interleave(row_of, block[w]);
    }
    for (int64_t c0 = 0; c0 < columns; c0 += 16) {
      if (width == 16 && columns - c0 >= 16) {
        Transpose16(block[0] + c0, kPanel, out + (n0 + c0) * words + w0, words);
        continue;
      }
      for (int64_t c = c0; c < std::min(columns, c0 + 16); ++c) {
        for (int64_t w = 0; w < width; ++w) out[(n0 + c) * words + w0 + w] = block[w][c];
      }
    }
  }
}

template <typename T>
ffi::Error Forward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer bias, ffi::AnyBuffer h_in,
                   ffi::AnyBuffer weight_in, ffi::Result<ffi::AnyBuffer> y_out, ffi::Result<ffi::AnyBuffer> sum_out,
                   ffi::Result<ffi::AnyBuffer> square_out, bool moments) {
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1], examples = h_in.dimensions()[1];
  const int64_t words = WordsOf<T>(k), panels = examples / kPanel, blocks = Ceil(n, kBlock);
  const float *w = Data<float>(kernel), *b = Data<float>(bias), *weight = Data<float>(weight_in);
  const T* h = Data<T>(h_in);
  T* y = Data<T>(*y_out);

  Word* a = Scratch<0>(RoundUp(n, Product<T>::kRowStep) * words);
  Word* packed = Scratch<2>(kSlice * words);
  float* partial = reinterpret_cast<float*>(Scratch<1>(panels * 2 * n));  // moments, by panel
  for (int64_t start = 0; start < panels; start += kSlicePanels) {
    const int64_t slice = std::min(kSlicePanels, panels - start), weights = start ? 0 : Ceil(n, kPanel);
    ParallelFor(pool, weights + slice, [&](int64_t i) {
      if (i < weights) return PackTransposed<T>(w, k, n, i * kPanel, words, a);
      i -= weights;
      PackPanel(h + (start + i) * kPanel, examples, k, words, packed + i * words * kPanel);
    });
    ParallelFor(pool, slice * blocks, [&](int64_t i) {
      const int64_t panel = start + i / blocks, first = panel * kPanel, n0 = i % blocks * kBlock;
      const int64_t rows = std::min(kBlock, n - n0);
      alignas(64) float c[kBlock * kPanel];
      Product<T>()(a + n0 * words, words, packed + i / blocks * words * kPanel, words, rows, c);
      for (int64_t r = 0; r < rows; ++r) {
        float *row = c + r * kPanel, *sums = partial + 2 * panel * n + n0 + r;
        BiasRelu(row, b[n0 + r]);
        Store(row, y + (n0 + r) * examples + first);
        if (moments) Moments(row, weight + first, sums, sums + n);
      }
    });
  }
  float *sum = Data<float>(*sum_out), *square = Data<float>(*square_out);
  std::fill_n(sum, n, 0.f);
  std::fill_n(square, n, 0.f);
  for (int64_t panel = 0; moments && panel < panels; ++panel) {
    AddTo(sum, partial + 2 * panel * n, n);
    AddTo(square, partial + (2 * panel + 1) * n, n);
  }
  return ffi::Error::Success();
}

template <typename T>
ffi::Error Backward(ffi::ThreadPool pool, ffi::AnyBuffer kernel, ffi::AnyBuffer h_in, ffi::AnyBuffer y_in,
                    ffi::AnyBuffer gy_in, ffi::AnyBuffer weight_in, ffi::AnyBuffer gsum_in, ffi::AnyBuffer gsquare_in,
                    ffi::Result<ffi::AnyBuffer> gkernel_out, ffi::Result<ffi::AnyBuffer> gbias_out,
                    ffi::Result<ffi::AnyBuffer> gh_out, bool moments) {
  const int64_t k = kernel.dimensions()[0], n = kernel.dimensions()[1], examples = h_in.dimensions()[1];
  const int64_t words = WordsOf<T>(n), panels = examples / kPanel, blocks = Ceil(k, kBlock);
  const int64_t panel_words = kPanel / kPerWord<T>, slice_words = kSlice / kPerWord<T>;
  const float *w = Data<float>(kernel), *weight = Data<float>(weight_in);
  const float *gsum = Data<float>(gsum_in), *gsquare = Data<float>(gsquare_in);
  const T *h = Data<T>(h_in), *y = Data<T>(y_in), *gy = Data<T>(gy_in);
  float *gkernel = Data<float>(*gkernel_out), *gbias = Data<float>(*gbias_out);
  T* gh = Data<T>(*gh_out);

  const int64_t padded_k = RoundUp(k, Product<T>::kRowStep);
  Word* a = Scratch<0>(padded_k * words);                       // W, in words along n
  float* partial = reinterpret_cast<float*>(Scratch<1>(panels * n));  // gradient of the bias, by panel
  Word* packed = Scratch<2>(kSlice * words);                    // g of a slice, by panel: words along n, examples
  Word* slice_h = Scratch<3>(padded_k * slice_words);           // h of a slice: k, words along the examples
  Word* slice_g = Scratch<4>(RoundUp(n, kPanel) * slice_words);  // g^T, by 64 features: words along the examples, n
  for (int64_t start = 0; start < panels; start += kSlicePanels) {
    const int64_t slice = std::min(kSlicePanels, panels - start), weights = start ? 0 : blocks;
    ParallelFor(pool, weights + slice, [&](int64_t i) {
      if (i < weights) {
        for (int64_t row = i * kBlock; row < std::min(k, (i + 1) * kBlock); ++row) {
          RoundRow(w + row * n, n, reinterpret_cast<T*>(a + row * words), words * kPerWord<T>);
        }
        return;
      }
      i -= weights;
      const int64_t panel = start + i, first = panel * kPanel;
      T* g = reinterpret_cast<T*>(Scratch<5>(RoundUp(n, 16) * panel_words));  // the gradient before the ReLU
      for (int64_t row = 0; row < n; ++row) {
        const int64_t at = row * examples + first;
        partial[panel * n + row] =
            moments ? ReluGradient<T, true>(gy + at, y + at, weight + first, gsum[row], 2 * gsquare[row], g + row * kPanel)
                    : ReluGradient<T, false>(gy + at, y + at, nullptr, 0, 0, g + row * kPanel);
      }
      PackPanel(g, kPanel, n, words, packed + i * words * kPanel);
      for (int64_t n0 = 0; n0 < n; n0 += 16) {
        Word* out = slice_g + n0 / kPanel * slice_words * kPanel + i * panel_words * kPanel + n0 % kPanel;
        for (int64_t w0 = 0; w0 < panel_words; w0 += 16) {
          Transpose16(reinterpret_cast<const Word*>(g) + n0 * panel_words + w0, panel_words, out + w0 * kPanel, kPanel);
        }
      }
      for (int64_t row = 0; row < k; ++row) {
        const T* from = h + row * examples + first;
        std::copy_n(from, kPanel, reinterpret_cast<T*>(slice_h + row * slice_words + i * panel_words));
      }
    });
    const int64_t inputs = slice * blocks;
    ParallelFor(pool, inputs + Ceil(n, kPanel) * blocks, [&](int64_t i) {
      const bool of_input = i < inputs;
      i -= of_input ? 0 : inputs;
      const int64_t panel = i / blocks, k0 = i % blocks * kBlock, rows = std::min(kBlock, k - k0);
      alignas(64) float c[kBlock * kPanel];
      if (of_input) {
        Product<T>()(a + k0 * words, words, packed + panel * words * kPanel, words, rows, c);
        for (int64_t r = 0; r < rows; ++r) {
          Store(c + r * kPanel, gh + (k0 + r) * examples + (start + panel) * kPanel);
        }
        return;
      }
      const int64_t n0 = panel * kPanel, columns = std::min(kPanel, n - n0);
      Product<T>()(slice_h + k0 * slice_words, slice_words, slice_g + n0 * slice_words, slice * panel_words, rows, c);
      for (int64_t r = 0; r < rows; ++r) {
        float* out = gkernel + (k0 + r) * n + n0;
        if (start == 0) {
          std::copy_n(c + r * kPanel, columns, out);
        } else {
          AddTo(out, c + r * kPanel, columns);
        }
      }
    });
  }
  std::fill_n(gbias, n, 0.f);
  for (int64_t panel = 0; panel < panels; ++panel) AddTo(gbias, partial + panel * n, n);
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
