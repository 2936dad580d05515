// Rows of plain CSV in the Criteo format to numbers, in one pass over the bytes. What is not plain is left to the caller.

#include <cstdint>
#include <cstring>

namespace {

constexpr int kIntegers = 13, kCategories = 26;
constexpr int kMostDigits = 18;  // that fit 64 bits whatever they are
constexpr int64_t kLongestId = 16;

// Fingerprint64 of up to 16 bytes, and its words, as in embeddings/hashing.py.
constexpr uint64_t kK0 = 0xC3A5C85C97CB3127, kK2 = 0x9AE16A3B2F90404F;

uint64_t Load64(const char* s) {
  uint64_t x;
  std::memcpy(&x, s, sizeof x);
  return x;
}
uint32_t Load32(const char* s) {
  uint32_t x;
  std::memcpy(&x, s, sizeof x);
  return x;
}
uint64_t Rotate(uint64_t x, int bits) { return x >> bits | x << (64 - bits); }
uint64_t ShiftMix(uint64_t x) { return x ^ x >> 47; }
uint64_t HashLen16(uint64_t u, uint64_t v, uint64_t mul) {
  const uint64_t a = ShiftMix((u ^ v) * mul);
  return ShiftMix((v ^ a) * mul) * mul;
}

uint64_t Fingerprint(const char* s, int64_t n) {
  const uint64_t mul = kK2 + 2 * n;
  if (n >= 8) {
    const uint64_t a = Load64(s) + kK2, b = Load64(s + n - 8);
    return HashLen16(Rotate(b, 37) * mul + a, (Rotate(a, 25) + b) * mul, mul);
  }
  if (n >= 4) return HashLen16(n + (static_cast<uint64_t>(Load32(s)) << 3), Load32(s + n - 4), mul);
  if (n == 0) return kK2;
  auto byte = [s](int64_t i) { return static_cast<uint64_t>(static_cast<uint8_t>(s[i])); };
  const uint64_t y = byte(0) + (byte(n >> 1) << 8), z = n + (byte(n - 1) << 2);
  return ShiftMix(y * kK2 ^ z * kK0) * kK2;
}

// Whether all of eight bytes are from '-' to DEL: digits and letters are, what ends a field is not, nor is a quote.
bool AreWords(uint64_t eight) {
  constexpr uint64_t kEach = 0x0101010101010101, kHigh = 0x80 * kEach;
  return !(eight & kHigh) && !(~(eight + (0x80 - '-') * kEach) & kHigh);
}

bool IsPlain(char c) { return static_cast<int8_t>(c) > 0 && c != ',' && c != '"' && c != '\n' && c != '\r'; }

struct Reader {
  const char *at, *end;

  bool Take(char c) { return at < end && *at == c ? (++at, true) : false; }

  // An integer of any sign, or nothing.
  bool TakeInteger(float* out, bool* missing) {
    const bool negative = Take('-');
    const char* first = at;
    int64_t value = 0;
    for (; at < end && static_cast<uint8_t>(*at - '0') < 10; ++at) {
      if (at - first == kMostDigits) return false;
      value = 10 * value + (*at - '0');
    }
    *missing = at == first;
    if (*missing && negative) return false;
    *out = static_cast<float>(static_cast<double>(negative ? -value : value));
    return true;
  }

  // An id of up to 16 bytes.
  bool TakeId(uint64_t empty, uint64_t* out) {
    if (end - at > 8 && !IsPlain(at[8]) && AreWords(Load64(at))) {
      *out = Fingerprint(at, 8);
      at += 8;
      return true;
    }
    const char* first = at;
    while (at < end && IsPlain(*at)) ++at;
    *out = at == first ? empty : Fingerprint(first, at - first);
    return at - first <= kLongestId;
  }

  bool TakeLineEnd() {
    if (at == end) return true;
    if (*at == '\r') ++at;
    return Take('\n');
  }
};

}  // namespace

// 1 if all of `size` bytes are so many plain rows, whose values are then written; else 0. Plain: 40 fields with a comma
// between them and nothing around them, a label of 0 or 1, integers of up to 18 digits, ids of up to 16 ASCII characters
// of which none is a quote or NUL; each row ends with a line feed, with or without a carriage return, or with the data.
// Column by column: integers f32[13, rows], 0 where there is none and its bit of `missing` is 1; hashes u64[26, rows],
// Fingerprint64 of the id, or `empty`.
extern "C" int DlrmParseLines(const char* data, int64_t size, int64_t rows, uint64_t empty, uint8_t* label,
                              float* integers, uint16_t* missing, uint64_t* hashes) {
  Reader reader{data, data + size};
  for (int64_t row = 0; row < rows; ++row) {
    if (reader.at == reader.end || static_cast<uint8_t>(*reader.at - '0') > 1) return 0;
    label[row] = *reader.at++ - '0';
    unsigned none = 0;
    for (int i = 0; i < kIntegers; ++i) {
      bool is_missing;
      if (!reader.Take(',') || !reader.TakeInteger(integers + i * rows + row, &is_missing)) return 0;
      none |= static_cast<unsigned>(is_missing) << i;
    }
    missing[row] = none;
    for (int i = 0; i < kCategories; ++i) {
      if (!reader.Take(',') || !reader.TakeId(empty, hashes + i * rows + row)) return 0;
    }
    if (!reader.TakeLineEnd()) return 0;
  }
  return reader.at == reader.end;
}
