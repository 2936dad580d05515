// What the kernels of the layers share: how weights and activations are packed for the product of dense_core.h, the three
// products that they make with them, and how lanes of examples are cut and what they add up is summed.

#ifndef DLRM_JAX_NATIVE_PACKING_H_
#define DLRM_JAX_NATIVE_PACKING_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dense_core.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {

constexpr int64_t kPanel = 64;   // columns of a panel: examples, or features of g^T
constexpr int64_t kSlice = 512;  // examples of a slice: its h and g^T stay in the second-level cache
constexpr int64_t kSlicePanels = kSlice / kPanel;
constexpr int64_t kBlock = 96;   // rows of C that are made at a time: a multiple of 6 and of 32
constexpr int64_t kDepth = 256;  // words of a sum over examples at a time: half of B stays in the first-level cache
constexpr int64_t kLanes = 4;    // for each thread, so that one that is held up is helped

template <typename T>
constexpr int64_t kPerWord = sizeof(Word) / sizeof(T);

inline int64_t Ceil(int64_t n, int64_t step) { return (n + step - 1) / step; }

template <typename T>
T* Data(xla::ffi::AnyBuffer buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

template <typename T>
int64_t WordsOf(int64_t elements) {
  return RoundUp(Ceil(elements, kPerWord<T>), Product<T>::kWordStep);
}

// Words from one row of A to the next: an odd number of cache lines, or the rows of a tile would share a few sets of the
// first-level cache.
inline int64_t Stride(int64_t words) { return (Ceil(words, 16) | 1) * 16; }

// out[row of 64 examples, kPerWord rows of in to a word] <- in[rows, 64 of ld examples], as T; rows past the end are zero.
template <typename T, typename In>
void PackPanel(const In* in, int64_t ld, int64_t rows, int64_t words, Word* out) {
  static const In zeros[kPanel] = {};
  auto row_of = [&](int64_t row) { return row < rows ? in + row * ld : zeros; };
  for (int64_t w = 0; w < words; ++w, out += kPanel) {
    if constexpr (std::is_same_v<T, In>) {
      const T* rows_in[kPerWord<T>];
      for (int64_t i = 0; i < kPerWord<T>; ++i) rows_in[i] = row_of(w * kPerWord<T> + i);
      Interleave(rows_in, out);
    } else {
      static_assert(kPerWord<T> == 1);
      CopyRow(row_of(w), reinterpret_cast<T*>(out));
    }
  }
}

// out[N, words of K] <- W^T: the words of the rows [from, to) of W, where `from` is a multiple of 64 and `to` another, or K.
// What is past the end of K is zero. All columns of some rows at a time, as they lie in memory.
template <typename T>
void PackTransposed(const float* kernel, int64_t k, int64_t n, int64_t from, int64_t to, Word* out) {
  const int64_t ld = Stride(WordsOf<T>(k)), end = WordsOf<T>(to);
  for (int64_t w0 = from / kPerWord<T>; w0 < end; w0 += 16) {
    const int64_t width = std::min<int64_t>(16, end - w0);
    for (int64_t n0 = 0; n0 < n; n0 += kPanel) {
      const int64_t columns = std::min(kPanel, n - n0);
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
          Transpose16(block[0] + c0, kPanel, out + (n0 + c0) * ld + w0, ld);
          continue;
        }
        for (int64_t c = c0; c < std::min(columns, c0 + 16); ++c) {
          for (int64_t w = 0; w < width; ++w) out[(n0 + c) * ld + w0 + w] = block[w][c];
        }
      }
    }
  }
}

// out[K, words of N] <- W: the rows [from, to) of it.
template <typename T>
void PackRows(const float* kernel, int64_t n, int64_t from, int64_t to, Word* out) {
  const int64_t words = WordsOf<T>(n);
  for (int64_t row = from; row < to; ++row) {
    RoundRow(kernel + row * n, n, reinterpret_cast<T*>(out + row * Stride(words)), words * kPerWord<T>);
  }
}

// Whether this thread has yet to pack the weights of the call, as each does for itself.
inline bool IsFirstOf(int64_t call) {
  thread_local int64_t last = -1;
  return std::exchange(last, call) != call;
}

inline int64_t NewCall() {
  static std::atomic<int64_t> calls{0};
  return calls.fetch_add(1, std::memory_order_relaxed);
}

// Multiplies packed rows, A of so many words each, by a packed panel, and calls use(row, 64 numbers) for each row of C.
template <typename T, typename Use>
void ForRowsOfProduct(const Product<T>& product, const Word* a, int64_t words, const Word* panel, int64_t rows,
                      const Use& use) {
  const int64_t stride = Stride(words);
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t some = std::min(kBlock, rows - first);
    alignas(64) float c[kBlock * kPanel];
    product(a + first * stride, stride, panel, words, some, c, kPanel, false);
    for (int64_t r = 0; r < some; ++r) use(first + r, c + r * kPanel);
  }
}

template <typename T>
constexpr int64_t kPanelWords = kPanel / kPerWord<T>;
template <typename T>
constexpr int64_t kSliceWords = kSlice / kPerWord<T>;

// The i-th panel, g [n, 64], of a slice as g^T, which is packed by 64 features: so many words along the examples.
template <typename T>
void TransposePanel(const T* g, int64_t n, int64_t i, Word* slice, int64_t words) {
  for (int64_t n0 = 0; n0 < n; n0 += 16) {
    Word* out = slice + n0 / kPanel * words * kPanel + i * kPanelWords<T> * kPanel + n0 % kPanel;
    for (int64_t w = 0; w < kPanelWords<T>; w += 16) {
      Transpose16(reinterpret_cast<const Word*>(g) + n0 * kPanelWords<T> + w, kPanelWords<T>, out + w * kPanel, kPanel);
    }
  }
}

// The gradient of a kernel, [k, n], by the first `words` of h, [k, words of examples], and g^T of a slice, which have room
// for `slice_words`: the columns from n0 on, up to 64 of them. With `start`, it is added to what is there, as if the slices
// before were part of this one.
template <typename T>
void KernelGradient(const Product<T>& product, const Word* h, const Word* g, int64_t slice_words, int64_t words, int64_t k,
                    int64_t n, int64_t n0, bool start, float* gkernel) {
  const int64_t columns = std::min(kPanel, n - n0), ld = Stride(slice_words);
  g += n0 * slice_words;
  for (int64_t first = 0; first < k; first += kBlock) {
    const int64_t rows = std::min(kBlock, k - first);
    float* out = gkernel + first * n + n0;
    alignas(64) float c[kBlock * kPanel];
    for (int64_t r = 0; start && r < rows; ++r) std::memcpy(c + r * kPanel, out + r * n, columns * sizeof(float));
    for (int64_t w = 0; w < words; w += kDepth) {
      product(h + first * ld + w, ld, g + w * kPanel, std::min(kDepth, words - w), rows, c, kPanel, start || w > 0);
    }
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * n, c + r * kPanel, columns * sizeof(float));
  }
}

// The same, of all columns.
template <typename T>
void KernelGradients(const Product<T>& product, const Word* h, const Word* g, int64_t slice_words, int64_t words, int64_t k,
                     int64_t n, bool start, float* gkernel) {
  for (int64_t n0 = 0; n0 < n; n0 += kPanel) {
    KernelGradient(product, h, g, slice_words, words, k, n, n0, start, gkernel);
  }
}

// Lanes of a call that makes gradients of kernels: every one costs a gradient to write and to add, so that there are more
// than one a thread only where there is much to do.
inline int64_t GradientLanes(int64_t examples, int64_t threads) {
  return std::min(examples / kPanel, std::max(threads, std::min(kLanes * threads, examples / kSlice)));
}

inline int64_t LaneStart(int64_t lane, int64_t lanes, int64_t panels) { return lane * panels / lanes; }

// out[i] <- the sum over the lanes, in order, of in[lane][i], where a lane has `ld` numbers.
inline void SumLanes(const float* in, int64_t lanes, int64_t ld, int64_t n, float* out) {
  std::fill_n(out, n, 0.f);
  for (int64_t lane = 0; lane < lanes; ++lane) AddTo(out, in + lane * ld, n);
}

// gkernel, of `size` numbers, <- the sum over the lanes of theirs, which lie `ld` numbers apart.
inline void SumKernelGradients(xla::ffi::ThreadPool& pool, const float* in, int64_t lanes, int64_t ld, int64_t size,
                               float* gkernel) {
  constexpr int64_t kPiece = 1 << 15;
  ParallelFor(pool, Ceil(size, kPiece), [&](int64_t i) {
    const int64_t at = i * kPiece;
    SumLanes(in + at, lanes, ld, std::min(kPiece, size - at), gkernel + at);
  });
}

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_PACKING_H_
