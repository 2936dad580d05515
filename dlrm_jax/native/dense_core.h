// The product C[m, 64] = A[m, k] B[k, 64] in 32-bit words along k, for float and bfloat16, and element-wise work on rows
// of 64. Chosen by what the compiler is told of the processor (-march=native): AMX, AVX512-BF16, or plain vectors.

#ifndef DLRM_JAX_NATIVE_DENSE_CORE_H_
#define DLRM_JAX_NATIVE_DENSE_CORE_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(DLRM_EMULATE_AMX)
#include "amx_emulation.h"
#define DLRM_AMX 1
#elif defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define DLRM_AMX 1
#endif

namespace dlrm {

using Word = uint32_t;

struct BFloat16 {
  uint16_t bits;
};

// The same number in the place of a float.
struct WideBFloat16 {
  float value;
};

// As what numbers are multiplied. A processor without products of bfloat16 would have to take apart the two of a word at
// every product, and was a third slower than with floats; the sums are the same, in the same order.
template <typename T>
struct OperandOf {
  using Type = T;
};
#if !defined(DLRM_AMX) && !defined(__AVX512BF16__)
template <>
struct OperandOf<BFloat16> {
  using Type = WideBFloat16;
};
#endif
template <typename T>
using Operand = typename OperandOf<T>::Type;

inline int64_t RoundUp(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- One element.

inline float Widen(float x) { return x; }
inline float Widen(WideBFloat16 x) { return x.value; }
inline float Widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <typename T>
T Round(float x);
template <>
inline float Round<float>(float x) {
  return x;
}
template <>
inline BFloat16 Round<BFloat16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline WideBFloat16 Round<WideBFloat16>(float x) {
  return {Widen(Round<BFloat16>(x))};
}

// ---- Rows of 64.

// 64 words, each of one element of each row.
inline void Interleave(const float* const rows[1], Word* out) { std::memcpy(out, rows[0], 64 * sizeof(Word)); }
inline void Interleave(const WideBFloat16* const rows[1], Word* out) { std::memcpy(out, rows[0], 64 * sizeof(Word)); }
inline void Interleave(const BFloat16* const rows[2], Word* out) {
  const uint16_t *low = &rows[0]->bits, *high = &rows[1]->bits;
  for (int i = 0; i < 64; ++i) out[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
}

inline void AddTo(float* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += in[i];
}

// Numbers of a register. Not more: GCC cuts wider vectors up through memory, which made AVX2 a fifth as fast as it is.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif
constexpr int kVectors = 64 / kWidth;  // of a row
typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef float VectorAt __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));  // in memory, anywhere

typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

inline Vector LoadVector(const void* in) { return *static_cast<const VectorAt*>(in); }
inline void StoreVector(Vector v, void* out) { *static_cast<VectorAt*>(out) = v; }

// What makes up a sum, as 16 numbers.
inline void Store16(Vector v, float* out) {
  StoreVector(v, out);
  if constexpr (kWidth < 16) StoreVector(Vector{}, out + kWidth);
}

inline void LoadRow(const float* in, Vector* out) {
  for (int i = 0; i < kVectors; ++i) out[i] = LoadVector(in + kWidth * i);
}
inline void LoadRow(const BFloat16* in, Vector* out) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
  for (int i = 0; i < kVectors; ++i) {
    Halves half;
    std::memcpy(&half, in + kWidth * i, sizeof half);
    out[i] = (Vector)(__builtin_convertvector(half, Words) << 16);
  }
}

inline void LoadRow(const WideBFloat16* in, Vector* out) { LoadRow(&in->value, out); }

inline void StoreRow(const Vector* in, float* out) {
  for (int i = 0; i < kVectors; ++i) StoreVector(in[i], out + kWidth * i);
}
// The bits of bfloat16, in the lower half of each word; as Round.
inline Words RoundedBits(Vector x) {
  const Words bits = (Words)x;
  return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void StoreRow(const Vector* in, WideBFloat16* out) {
  for (int i = 0; i < kVectors; ++i) StoreVector((Vector)(RoundedBits(in[i]) << 16), out + kWidth * i);
}
inline void StoreRow(const Vector* in, BFloat16* out) {
#if defined(__AVX512BF16__)
  for (int i = 0; i < 4; i += 2) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)in[i + 1], (__m512)in[i]);
    std::memcpy(out + 16 * i, &both, sizeof both);
  }
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
  for (int i = 0; i < kVectors; ++i) {
    const Halves half = __builtin_convertvector(RoundedBits(in[i]), Halves);
    std::memcpy(out + kWidth * i, &half, sizeof half);
  }
#endif
}

template <typename In, typename Out>
inline void ConvertRow(const In* in, Out* out) {
  Vector x[kVectors];
  LoadRow(in, x);
  StoreRow(x, out);
}

// The same, of numbers that Out has.
template <typename In, typename Out>
inline void CopyRow(const In* in, Out* out) {
  if constexpr (std::is_same_v<In, Out>) {
    std::memcpy(out, in, 64 * sizeof(Out));
  } else {
    Vector x[kVectors];
    LoadRow(in, x);
    std::memcpy(out, x, sizeof x);
  }
}

// A row of any length, filled up with zeros to `size`.
template <typename T>
void RoundRow(const float* in, int64_t n, T* out, int64_t size) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) ConvertRow(in + i, out + i);
  for (; i < n; ++i) out[i] = Round<T>(in[i]);
  for (; i < size; ++i) out[i] = Round<T>(0.f);
}

// y <- max(0, row + bias), NaN stays NaN; sum[16] and square[16] <- what makes up those of weight * y, weight * y^2.
template <typename T, bool WithMoments>
inline void Activate(const float* row, float bias, const float* weight, T* y, float* sum, float* square) {
  Vector x[kVectors], s = {}, q = {};
  for (int i = 0; i < kVectors; ++i) {
    x[i] = LoadVector(row + kWidth * i) + bias;
    x[i] = x[i] < 0 ? Vector{} : x[i];
    if constexpr (WithMoments) {
      const Vector wx = LoadVector(weight + kWidth * i) * x[i];
      s += wx;
      q += wx * x[i];
    }
  }
  StoreRow(x, y);
  if constexpr (WithMoments) {
    Store16(s, sum);
    Store16(q, square);
  }
}

// g <- gradient before the ReLU where y is above 0: gy and, through the moments, weight * (gsum + y * gsquare2).
// sum[16] <- what makes up the sum of g before it is rounded.
template <typename In, typename T, bool WithMoments>
inline void ReluGradient(const In* gy, const In* y, const float* weight, float gsum, float gsquare2, T* g, float* sum) {
  Vector x[kVectors], active[kVectors], total = {};
  LoadRow(gy, x);
  LoadRow(y, active);
  for (int i = 0; i < kVectors; ++i) {
    if constexpr (WithMoments) x[i] += LoadVector(weight + kWidth * i) * (gsum + active[i] * gsquare2);
    x[i] = active[i] > 0 ? x[i] : Vector{};
    total += x[i];
  }
  StoreRow(x, g);
  Store16(total, sum);
}

// out[16, 16] <- in^T; ld: words from row to row.
inline void Transpose16(const Word* in, int64_t ld_in, Word* out, int64_t ld_out) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * ld_in);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * ld_out, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * ld_out, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
#elif defined(__AVX__)
  for (int64_t r = 0; r < 16; r += 8) {
    for (int64_t c = 0; c < 16; c += 8) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in + (r + i) * ld_in + c));
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
      }
      for (int i = 0; i < 4; ++i) {
        float* to = reinterpret_cast<float*>(out + (c + i) * ld_out + r);
        _mm256_storeu_ps(to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + 4 * ld_out, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
      }
    }
  }
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[j * ld_out + i] = in[i * ld_in + j];
  }
#endif
}

// out[i] <- the sum of the 16 numbers of row i, by halves.
inline void SumRows(const float* rows, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16, rows += 256) {
    const int64_t some = n - i < 16 ? n - i : 16;
    alignas(64) Word all[256], turned[16][16];
    if (some < 16) {
      std::memcpy(all, rows, some * 64);
      std::memset(all + some * 16, 0, (16 - some) * 64);
    }
    Transpose16(some < 16 ? all : reinterpret_cast<const Word*>(rows), 16, turned[0], 16);
    float* sums = reinterpret_cast<float*>(turned);
    for (int64_t half = 8; half; half /= 2) AddTo(sums, sums + 16 * half, 16 * half);
    std::memcpy(out + i, sums, some * sizeof(float));
  }
}

// ---- The product.

// Rows x Columns of C in registers: 24 of the 32 of AVX-512, 12 of the 16 of AVX2.
#if defined(__AVX512F__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

template <typename T>
inline Vector MultiplyAdd(Vector c, Word a, Vector b);

template <>
inline Vector MultiplyAdd<float>(Vector c, Word a, Vector b) {
  float x;
  std::memcpy(&x, &a, sizeof x);
  return c + x * b;
}

template <>
inline Vector MultiplyAdd<WideBFloat16>(Vector c, Word a, Vector b) {
  return MultiplyAdd<float>(c, a, b);
}

template <>
inline Vector MultiplyAdd<BFloat16>(Vector c, Word a, Vector b) {
#if defined(__AVX512BF16__)
  return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)b, (__m512bh)_mm512_set1_epi32(a));
#else  // compiled where AMX is emulated, and never called: see Operand
  const Words pair = (Words)b;
  c += Widen(BFloat16{static_cast<uint16_t>(a)}) * (Vector)(pair << 16);
  return c + Widen(BFloat16{static_cast<uint16_t>(a >> 16)}) * (Vector)(pair & 0xffff0000u);
#endif
}

// `add`: the product is added to what C holds.
template <typename T, int Rows>
void Tile(const Word* a, int64_t lda, const Word* b, int64_t words, float* c, bool add) {
  for (int64_t column = 0; column < 64; column += kColumns * kWidth) {
    Vector sum[Rows][kColumns] = {};
    for (int64_t w = 0; w < words; ++w) {
      Vector right[kColumns];
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) right[v] = LoadVector(b + w * 64 + column + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kColumns; ++v) sum[r][v] = MultiplyAdd<T>(sum[r][v], a[r * lda + w], right[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) {
        float* to = c + r * 64 + column + v * kWidth;
        StoreVector(add ? LoadVector(to) + sum[r][v] : sum[r][v], to);
      }
    }
  }
}

template <typename T>
void PlainProduct(const Word* a, int64_t lda, const Word* b, int64_t words, int64_t rows, float* c, bool add) {
  for (; rows >= 6; rows -= 6, a += 6 * lda, c += 6 * 64) Tile<T, 6>(a, lda, b, words, c, add);
  if (rows >= 4) {
    Tile<T, 4>(a, lda, b, words, c, add);
    rows -= 4, a += 4 * lda, c += 4 * 64;
  }
  if (rows >= 2) {
    Tile<T, 2>(a, lda, b, words, c, add);
    rows -= 2, a += 2 * lda, c += 2 * 64;
  }
  if (rows) Tile<T, 1>(a, lda, b, words, c, add);
}

template <typename T>
struct Product {
  static constexpr int64_t kWordStep = 1, kRowStep = 1;  // A and B are filled up to multiples of these

  void operator()(const Word* a, int64_t lda, const Word* b, int64_t words, int64_t rows, float* c, bool add) const {
    PlainProduct<T>(a, lda, b, words, rows, c, add);
  }
};

#if defined(DLRM_AMX)
inline bool MayUseTiles() {
#if defined(DLRM_EMULATE_AMX)
  return true;
#else
  // Linux gives the tile registers' state to a process only if it asks: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
#endif
}

// 32 x 32 of C in four tile registers; C has room for a multiple of 32 rows. What A holds past the last row does not
// matter: it ends in rows of C that nobody reads.
template <>
struct Product<BFloat16> {
  static constexpr int64_t kWordStep = 16, kRowStep = 32;

  Product() {
    if (!MayUseTiles()) return;
    alignas(64) static const struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Product() {
    if (MayUseTiles()) _tile_release();  // a thread without tiles in use is cheaper to switch
  }

  void operator()(const Word* a, int64_t lda, const Word* b, int64_t words, int64_t rows, float* c, bool add) const {
    if (!MayUseTiles()) return PlainProduct<BFloat16>(a, lda, b, words, rows, c, add);
    asm volatile("" ::: "memory");  // the compiler does not know that tile loads read what was packed
    for (int64_t column = 0; column < 64; column += 32) {  // half of B stays in the first-level cache
      for (int64_t row = 0; row < rows; row += 32) {
        alignas(64) float product[32 * 32];  // if it is to be added: tiles add to what they begin with, in another order
        const int64_t ld = add ? 32 : 64;
        float *above = add ? product : c + row * 64 + column, *below = above + 16 * ld;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t w = 0; w < words; w += 16) {
          _tile_loadd(4, a + row * lda + w, lda * 4);
          _tile_loadd(6, b + w * 64 + column, 256);
          _tile_loadd(7, b + w * 64 + column + 16, 256);
          _tile_loadd(5, a + (row + 16) * lda + w, lda * 4);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, above, ld * 4);
        _tile_stored(1, above + 16, ld * 4);
        _tile_stored(2, below, ld * 4);
        _tile_stored(3, below + 16, ld * 4);
        for (int64_t r = 0; add && r < 32; ++r) AddTo(c + (row + r) * 64 + column, product + r * 32, 32);
      }
    }
    asm volatile("" ::: "memory");
  }
};
#endif

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_DENSE_CORE_H_
