// Columns of numbers to packed rows (see data/encode.py), in one pass: numpy writes a column at a time, and so goes over
// all of the rows forty times.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kIntegers = 13, kCategories = 26;
constexpr int64_t kRows = 64;  // rows at a time, which stay in the first-level cache

struct Divisor {
  explicit Divisor(uint64_t by) : by(by), inverse(~uint64_t{0} / by) {}

  uint32_t Remainder(uint64_t x) const {
    // At most one too small, since the inverse is less than one off: as often as not, which no branch would foresee.
    const uint64_t quotient = static_cast<unsigned __int128>(x) * inverse >> 64;
    const uint64_t rest = x - quotient * by;
    return rest < by ? rest : rest - by;
  }

  uint64_t by, inverse;
};

}  // namespace

// out[rows, width]: label, integers f32[13][rows] and a weight of 1, as their bits; before the weight hashes u64[26][rows]
// modulo `buckets`, and behind it, if the width has room for them, the hashes, low half first. Rows that are not good are 0.
extern "C" void DlrmEncode(int64_t rows, int64_t width, const uint8_t* label, const float* const* integers,
                           const uint64_t* const* hashes, const uint32_t* buckets, const uint8_t* good, uint32_t* out) {
  constexpr int kBucket = 1 + kIntegers, kWeight = kBucket + kCategories, kKey = kWeight + 1;
  const float one = 1;
  const std::vector<Divisor> divisors(buckets, buckets + kCategories);
  for (int64_t start = 0; start < rows; start += kRows) {
    const int64_t some = std::min(kRows, rows - start);
    uint32_t* block = out + start * width;
    for (int64_t r = 0; r < some; ++r) {
      const float clicked = label[start + r];
      std::memcpy(block + r * width, &clicked, sizeof clicked);
      std::memcpy(block + r * width + kWeight, &one, sizeof one);
    }
    for (int i = 0; i < kIntegers; ++i) {
      for (int64_t r = 0; r < some; ++r) std::memcpy(block + r * width + 1 + i, integers[i] + start + r, sizeof(float));
    }
    for (int i = 0; i < kCategories; ++i) {
      const Divisor divisor = divisors[i];
      const uint64_t* column = hashes[i] + start;
      for (int64_t r = 0; r < some; ++r) block[r * width + kBucket + i] = divisor.Remainder(column[r]);
      for (int64_t r = 0; r < some && width > kKey; ++r) {
        block[r * width + kKey + 2 * i] = static_cast<uint32_t>(column[r]);
        block[r * width + kKey + 2 * i + 1] = static_cast<uint32_t>(column[r] >> 32);
      }
    }
    for (int64_t r = 0; r < some; ++r) {
      if (!good[start + r]) std::fill_n(block + r * width, width, 0);
    }
  }
}
