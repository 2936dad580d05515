// What the kernels of the layers share: how weights and activations are packed for the product of dense_core.h, the three
// products that they make with them, and how a batch is cut for the threads and what they add up is summed.

#ifndef DLRM_JAX_NATIVE_PACKING_H_
#define DLRM_JAX_NATIVE_PACKING_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dense_core.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {

constexpr int64_t kPanel = 64;   // columns of a panel: examples, or features of g^T
constexpr int64_t kSlice = 512;  // examples of a slice: its h and g^T stay in the second-level cache
constexpr int64_t kSlicePanels = kSlice / kPanel;
constexpr int64_t kBlock = 96;   // rows of C that are made at a time: a multiple of 6 and of 32
constexpr int64_t kLeaf = 128;   // examples of a kernel's gradient that are summed one after another: a leaf of the tree
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
      alignas(64) Word block[16][kPanel];
      for (int64_t w = 0; w < width; ++w) {
        T rows[kPerWord<T>][kPanel];
        const T* row_of[kPerWord<T>];
        for (int64_t i = 0; i < kPerWord<T>; ++i) {
          const int64_t row = (w0 + w) * kPerWord<T> + i;
          RoundRow(kernel + row * n + n0, row < k ? columns : 0, rows[i], kPanel);
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

// Multiplies packed rows, A of so many words each, by a packed panel, and calls use(row, 64 numbers) for each row of C.
template <typename T, typename Use>
void ForRowsOfProduct(const Product<T>& product, const Word* a, int64_t words, const Word* panel, int64_t rows,
                      const Use& use) {
  const int64_t stride = Stride(words);
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t some = std::min(kBlock, rows - first);
    alignas(64) float c[kBlock * kPanel];
    product(a + first * stride, stride, panel, words, some, c, false);
    for (int64_t r = 0; r < some; ++r) use(first + r, c + r * kPanel);
  }
}

template <typename T>
constexpr int64_t kPanelWords = kPanel / kPerWord<T>;

// ---- Sums over examples. They are made as a tree: what is added up in one place, a leaf or a panel, is paired with its
// neighbor, pairs with neighbors are paired, and so on; what has no neighbor waits. So aligned stretches of 1, 2, 4, ...
// leaves can be summed apart, by lanes, slices or devices, and all come to the same bits.

// How many of n leaves, at least two, are on the left of the top of their tree.
inline int64_t LeftOf(int64_t n) {
  int64_t left = 1;
  while (2 * left < n) left *= 2;
  return left;
}

constexpr int64_t kAtOnce = 512;  // numbers of each term that are summed at a time, in the first-level cache

// out[i] <- the sum over the terms of in[term][i], which lie `ld` numbers apart; of `n` numbers, kAtOnce at most.
inline void SumTree(const float* in, int64_t terms, int64_t ld, int64_t n, float* out) {
  if (terms == 1) {
    std::copy_n(in, n, out);
    return;
  }
  const int64_t left = LeftOf(terms);
  float right[kAtOnce];
  SumTree(in, left, ld, n, out);
  SumTree(in + left * ld, terms - left, ld, n, right);
  AddTo(out, right, n);
}

// The same of any number of numbers; no term is zero.
inline void SumTerms(const float* in, int64_t terms, int64_t ld, int64_t n, float* out) {
  if (terms == 0) std::fill_n(out, n, 0.f);
  for (int64_t at = 0; terms && at < n; at += kAtOnce) SumTree(in + at, terms, ld, std::min(kAtOnce, n - at), out + at);
}

// Blocks of a tree of `leaves` that wait at once, the one at work among them.
constexpr int64_t Depth(int64_t leaves) { return leaves <= 1 ? 1 : 1 + Depth((leaves + 1) / 2); }

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

constexpr int64_t kMostLeaves = 16;  // of one call of KernelGradient

// C[rows, 64] <- A B, summed over leaves of words; c has room for a block for each step down the tree.
template <typename T>
void ProductOfLeaves(const Product<T>& product, const Word* a, int64_t lda, const Word* b, int64_t words, int64_t rows,
                     float* c) {
  constexpr int64_t kLeafWords = kLeaf / kPerWord<T>;
  if (words <= kLeafWords) return product(a, lda, b, words, rows, c, false);
  const int64_t left = LeftOf(Ceil(words, kLeafWords)) * kLeafWords;
  ProductOfLeaves(product, a, lda, b, left, rows, c);
  a += left, b += left * kPanel, words -= left;
  if (words <= kLeafWords) return product(a, lda, b, words, rows, c, true);
  float* right = c + kBlock * kPanel;
  ProductOfLeaves(product, a, lda, b, words, rows, right);
  AddTo(c, right, rows * kPanel);
}

// Lanes: stretches of 1, 2, 4, ... panels, in each of which sums are those of a tree, see above. The last may have less.
struct Lanes {
  int64_t panels, size;

  int64_t count() const { return Ceil(panels, size); }
  int64_t First(int64_t lane) const { return std::min(panels, lane * size); }
};

// As large as they may be if there are to be so many.
inline Lanes LanesOf(int64_t panels, int64_t wanted) {
  Lanes lanes{panels, 1};
  while (lanes.size < panels && Ceil(panels, 2 * lanes.size) >= wanted) lanes.size *= 2;
  return lanes;
}

// ---- Gradients of kernels, [k, n]. The batch is done slice by slice. Of each the threads take lanes of panels, which leave h,
// [k, words of examples], and g^T, by 64 features, in memory that all share; then they take pieces of the gradients.

constexpr int64_t kSharing = 4;  // threads at most for which a slice is larger: what the others' caches hold is slow to read
static_assert(kSharing * kSlice <= kMostLeaves * kLeaf);

struct Slices {
  int64_t panels, threads, size;  // of the batch; those of the pool; panels of a slice, whole leaves of a tree, or all

  Slices(int64_t panels, int64_t all_threads)
      : panels(panels), threads(std::max<int64_t>(1, all_threads)), size(kSlicePanels) {
    while (2 * size <= std::min(threads, kSharing) * kSlicePanels) size *= 2;
    size = std::min(size, panels);
  }
  int64_t count() const { return size ? Ceil(panels, size) : 1; }
  // Sums of the tree over slices that wait for their neighbor lie in so many places besides that of the result.
  int64_t waiting() const { return std::max<int64_t>(0, Depth(count()) - 2); }
};

struct Slice {
  int64_t number, first, last;  // of those before; its panels
  bool is_last;
};

// lane(slice, first panel, last panel) for the lanes of a slice, then end(slice), slice after slice.
template <typename OfLane, typename End>
void ForSlices(xla::ffi::ThreadPool& pool, const Slices& slices, const OfLane& lane, const End& end) {
  for (int64_t i = 0; i < slices.count(); ++i) {
    const Slice slice{i, i * slices.size, std::min(slices.panels, (i + 1) * slices.size), i + 1 == slices.count()};
    const int64_t panels = slice.last - slice.first;
    const Lanes lanes = slices.threads > 1 ? LanesOf(panels, kLanes * slices.threads) : Lanes{panels, panels};
    ParallelFor(pool, panels ? lanes.count() : 0, [&](int64_t which) {
      lane(slice, slice.first + lanes.First(which), slice.first + lanes.First(which + 1));
    });
    end(slice);
  }
}

// A gradient in pieces of some rows and 64 columns, all pieces of the same columns one after another.
struct Pieces {
  int64_t k, n, rows;

  Pieces(int64_t k, int64_t n, int64_t threads) : k(k), n(n), rows(2 * kBlock) {
    if (count() < 2 * threads) rows = kBlock;
    if (count() < 2 * threads) rows = kBlock / 3;
  }
  int64_t count() const { return Ceil(k, rows) * Ceil(n, kPanel); }
};

// A piece of the gradient, by what a slice holds: `words` of examples, where there is room for more. `waiting` are the
// Slices::waiting places, [k, n] each.
template <typename T>
void KernelGradient(const Product<T>& product, const Word* h, const Word* g, int64_t room, int64_t words,
                    const Pieces& pieces, int64_t piece, const Slice& slice, float* gkernel, float* waiting) {
  const int64_t k = pieces.k, n = pieces.n, of_columns = Ceil(k, pieces.rows), ld = Stride(room);
  const int64_t n0 = piece / of_columns * kPanel, k0 = piece % of_columns * pieces.rows, columns = std::min(kPanel, n - n0);
  for (int64_t first = k0; first < std::min(k, k0 + pieces.rows); first += kBlock) {
    const int64_t rows = std::min({kBlock, pieces.rows, k - first});
    alignas(64) float c[Depth(kMostLeaves) * kBlock * kPanel];
    ProductOfLeaves(product, h + first * ld, ld, g + n0 * room, words, rows, c);
    // What has no neighbor yet waits, that of 1, 2, 4, ... slices in a place of its own.
    auto place = [&](int64_t i) { return (i ? waiting + (i - 1) * k * n : gkernel) + first * n + n0; };
    int64_t at = 0;
    for (int64_t before = slice.number; slice.is_last ? before : before & 1; before /= 2, ++at) {
      for (int64_t r = 0; before & 1 && r < rows; ++r) AddTo(c + r * kPanel, place(at) + r * n, columns);
    }
    float* to = place(slice.is_last ? 0 : at);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * n, c + r * kPanel, columns * sizeof(float));
  }
}

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_PACKING_H_
