// What the kernels of the layers share: how weights and activations are packed for the product of dense_core.h, the three
// products that they make with them, and how lanes of examples are cut and what they add up is summed.

#ifndef DLRM_JAX_NATIVE_PACKING_H_
#define DLRM_JAX_NATIVE_PACKING_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "dense_core.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {

constexpr int64_t kPanel = 64;   // columns of a panel: examples, or features of g^T
constexpr int64_t kSlice = 512;  // examples of a slice: its h and g^T stay in the second-level cache
constexpr int64_t kSlicePanels = kSlice / kPanel;
constexpr int64_t kBlock = 96;  // rows of C that are made at a time: a multiple of 6 and of 32
constexpr int64_t kLanes = 4;   // for each thread, so that one that is held up is helped

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
  const int64_t columns = std::min(kPanel, n - n0), ld = Stride(words);
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
        Transpose16(block[0] + c0, kPanel, out + (n0 + c0) * ld + w0, ld);
        continue;
      }
      for (int64_t c = c0; c < std::min(columns, c0 + 16); ++c) {
        for (int64_t w = 0; w < width; ++w) out[(n0 + c) * ld + w0 + w] = block[w][c];
      }
    }
  }
}

// out[N, words of K] <- W^T.
template <typename T>
void PackTransposed(const float* kernel, int64_t k, int64_t n, int64_t words, Word* out) {
  for (int64_t n0 = 0; n0 < n; n0 += kPanel) PackTransposed<T>(kernel, k, n, n0, words, out);
}

// out[K, words of N] <- W.
template <typename T>
void PackRows(const float* kernel, int64_t k, int64_t n, int64_t words, Word* out) {
  for (int64_t row = 0; row < k; ++row, out += Stride(words)) {
    RoundRow(kernel + row * n, n, reinterpret_cast<T*>(out), words * kPerWord<T>);
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

// The i-th panel, g [n, 64], of a slice as g^T, which is packed by 64 features: words along the examples.
template <typename T>
void TransposePanel(const T* g, int64_t n, int64_t i, Word* slice) {
  for (int64_t n0 = 0; n0 < n; n0 += 16) {
    Word* out = slice + n0 / kPanel * kSliceWords<T> * kPanel + i * kPanelWords<T> * kPanel + n0 % kPanel;
    for (int64_t w = 0; w < kPanelWords<T>; w += 16) {
      Transpose16(reinterpret_cast<const Word*>(g) + n0 * kPanelWords<T> + w, kPanelWords<T>, out + w * kPanel, kPanel);
    }
  }
}

// Adds to the gradient of a kernel, [k, n] of `ld`, what a slice of so many panels contributes; without `start`, writes it.
template <typename T>
void AddKernelGradient(const Product<T>& product, const Word* h, const Word* g, int64_t panels, int64_t k, int64_t n,
                       float* gkernel, int64_t ld, bool start) {
  for (int64_t n0 = 0; n0 < n; n0 += kPanel) {
    product(h, Stride(kSliceWords<T>), g + n0 * kSliceWords<T>, panels * kPanelWords<T>, k, gkernel + n0, ld, start);
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

// gkernel [k, n] <- the sum over the lanes of theirs, [k, n] of `ld`, which lie `lane_size` numbers apart.
inline void SumKernelGradients(xla::ffi::ThreadPool& pool, const float* in, int64_t lanes, int64_t lane_size, int64_t k,
                               int64_t n, int64_t ld, float* gkernel) {
  ParallelFor(pool, Ceil(k, kBlock), [&](int64_t block) {
    for (int64_t row = block * kBlock; row < std::min(k, (block + 1) * kBlock); ++row) {
      SumLanes(in + row * ld, lanes, lane_size, n, gkernel + row * n);
    }
  });
}

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_PACKING_H_
