"""FarmHash's Fingerprint64 (na variant), bit for bit the hash behind TensorFlow's `string_to_hash_bucket_fast`.

Source: google/farmhash, src/farmhash.cc, namespace farmhashna (MIT licence). Ids of Criteo are eight hex digits, so the
eight-byte case is vectorised: the little-endian 64-bit fetch that the hash starts with is the Arrow data buffer itself.
"""

import numpy as np
import pyarrow as pa

K0 = 0xC3A5C85C97CB3127
K1 = 0xB492B66FBE98F273
K2 = 0x9AE16A3B2F90404F
MASK = (1 << 64) - 1

# Long enough to hide numpy's cost of a call, short enough to keep the temporaries in the second-level cache.
BLOCK = 16384


def fingerprint64_eight(words: np.ndarray) -> np.ndarray:
  """Fingerprint64 of eight-byte strings: `u64[N]` little-endian fetches of the bytes to `u64[N]`."""
  words = np.ascontiguousarray(words, dtype='<u8')
  out = np.empty(words.shape, np.uint64)
  scratch = np.empty((2, min(BLOCK, len(words))), np.uint64)
  for start in range(0, len(words), BLOCK):
    part = words[start : start + BLOCK]
    _hash_eight(part, out[start : start + BLOCK], *scratch[:, : len(part)])
  return out


def _hash_eight(b: np.ndarray, c: np.ndarray, d: np.ndarray, t: np.ndarray) -> None:
  """The branch for 8 to 16 bytes at length 8: words `b` to hashes `c`, with `d` and `t` as scratch."""
  mul, k2 = np.uint64((K2 + 16) & MASK), np.uint64(K2)
  # c = rotate(b, 37) * mul + a, where a = b + k2 is in t
  np.right_shift(b, np.uint64(37), out=c)
  c |= np.left_shift(b, np.uint64(27), out=t)
  c *= mul
  c += np.add(b, k2, out=t)
  # d = (rotate(a, 25) + b) * mul
  np.right_shift(t, np.uint64(25), out=d)
  t <<= np.uint64(39)
  d |= t
  d += b
  d *= mul
  # HashLen16(c, d, mul)
  c ^= d
  c *= mul
  c ^= np.right_shift(c, np.uint64(47), out=t)
  c ^= d
  c *= mul
  c ^= np.right_shift(c, np.uint64(47), out=t)
  c *= mul


def fingerprint64_strings(strings: pa.Array, empty: int = K2) -> np.ndarray:
  """Fingerprint64 of each string, `u64[N]`.

  Args:
    strings: a pyarrow string or binary array, or one of their large forms.
    empty: the value for nulls and empty strings; Fingerprint64 of the empty string unless given.
  """
  offsets, data = string_buffers(strings)
  lengths = np.diff(offsets)
  if strings.null_count:  # what lies under a null is undefined
    lengths[strings.is_null().to_numpy(zero_copy_only=False)] = 0
  eight = np.flatnonzero(lengths == 8)
  if offsets[-1] - offsets[0] == 8 * len(eight):  # nothing lies between them
    words = data[offsets[0] : offsets[-1]].view('<u8')
  else:
    words = data[offsets[eight][:, None] + np.arange(8)].view('<u8').reshape(-1)
  hashes = fingerprint64_eight(words)
  if len(eight) == len(lengths):
    return hashes
  out = np.full(len(lengths), empty, np.uint64)
  out[eight] = hashes
  if lengths.sum() > 8 * len(eight):
    _hash_others(out, lengths, offsets, data)
  return out


def _hash_others(out: np.ndarray, lengths: np.ndarray, offsets: np.ndarray, data: np.ndarray) -> None:
  """Hashes the strings that have neither 0 nor 8 bytes into `out`, each value once."""
  seen: dict[bytes, int] = {}
  for i in np.flatnonzero((lengths != 0) & (lengths != 8)):
    value = data[offsets[i] : offsets[i + 1]].tobytes()
    if value not in seen:
      seen[value] = fingerprint64(value)
    out[i] = seen[value]


def string_buffers(strings: pa.Array) -> tuple[np.ndarray, np.ndarray]:
  """Offsets `i32[N + 1]` (`i64` for large strings) and data `u8[...]` of a string array, without copying."""
  large = pa.types.is_large_string(strings.type) or pa.types.is_large_binary(strings.type)
  _, offsets, data = strings.buffers()
  dtype = np.dtype(np.int64 if large else np.int32)
  if offsets is None or offsets.size == 0:
    return np.zeros(1, dtype), np.empty(0, np.uint8)
  offsets = np.frombuffer(offsets, dtype, count=len(strings) + 1, offset=strings.offset * dtype.itemsize)
  return offsets, np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)


def fingerprint64(value: bytes) -> int:
  """Fingerprint64 of one byte string of any length, 0 <= result < 2**64."""
  n = len(value)
  if n <= 16:
    return _hash_0_to_16(value, n)
  if n <= 32:
    return _hash_17_to_32(value, n)
  if n <= 64:
    return _hash_33_to_64(value, n)
  return _hash_long(value, n)


def _fetch64(s: bytes, at: int) -> int:
  return int.from_bytes(s[at : at + 8], 'little')


def _fetch32(s: bytes, at: int) -> int:
  return int.from_bytes(s[at : at + 4], 'little')


def _ror(x: int, bits: int) -> int:
  x &= MASK
  return (x >> bits | x << (64 - bits)) & MASK


def _shift_mix(x: int) -> int:
  return x ^ (x >> 47)


def _hash_len_16(u: int, v: int, mul: int) -> int:
  a = _shift_mix(((u ^ v) & MASK) * mul & MASK)
  return _shift_mix(((v ^ a) & MASK) * mul & MASK) * mul & MASK


def _hash_0_to_16(s: bytes, n: int) -> int:
  mul = K2 + 2 * n
  if n >= 8:
    a, b = _fetch64(s, 0) + K2, _fetch64(s, n - 8)
    return _hash_len_16((_ror(b, 37) * mul + a) & MASK, (_ror(a, 25) + b) * mul & MASK, mul)
  if n >= 4:
    return _hash_len_16(n + (_fetch32(s, 0) << 3), _fetch32(s, n - 4), mul)
  if n > 0:
    y, z = s[0] + (s[n >> 1] << 8), n + (s[n - 1] << 2)
    return _shift_mix((y * K2 ^ z * K0) & MASK) * K2 & MASK
  return K2


def _hash_17_to_32(s: bytes, n: int) -> int:
  mul = K2 + 2 * n
  a, b = _fetch64(s, 0) * K1, _fetch64(s, 8)
  c, d = _fetch64(s, n - 8) * mul, _fetch64(s, n - 16) * K2
  return _hash_len_16((_ror(a + b, 43) + _ror(c, 30) + d) & MASK, (a + _ror(b + K2, 18) + c) & MASK, mul)


def _hash_33_to_64(s: bytes, n: int) -> int:
  mul = K2 + 2 * n
  a, b = _fetch64(s, 0) * K2, _fetch64(s, 8)
  c, d = _fetch64(s, n - 8) * mul, _fetch64(s, n - 16) * K2
  y = (_ror(a + b, 43) + _ror(c, 30) + d) & MASK
  z = _hash_len_16(y, (a + _ror(b + K2, 18) + c) & MASK, mul)
  e, f = _fetch64(s, 16) * mul, _fetch64(s, 24)
  g, h = (y + _fetch64(s, n - 32)) * mul, (z + _fetch64(s, n - 24)) * mul
  return _hash_len_16((_ror(e + f, 43) + _ror(g, 30) + h) & MASK, (e + _ror(f + a, 18) + g) & MASK, mul)


def _weak_hash_32(s: bytes, at: int, a: int, b: int) -> tuple[int, int]:
  """WeakHashLen32WithSeeds of the 32 bytes at `at`."""
  w, x, y, z = (_fetch64(s, at + 8 * i) for i in range(4))
  a = (a + w) & MASK
  b = _ror(b + a + z, 21)
  c = a
  a = (a + x + y) & MASK
  b += _ror(a, 44)
  return (a + z) & MASK, (b + c) & MASK


def _hash_long(s: bytes, n: int) -> int:
  """More than 64 bytes: 56 bytes of state through blocks of 64 bytes, the last block overlapping the one before it."""
  seed = 81
  x, y = seed, (seed * K1 + 113) & MASK
  z = _shift_mix((y * K2 + 113) & MASK) * K2 & MASK
  v, w = (0, 0), (0, 0)
  x = (x * K2 + _fetch64(s, 0)) & MASK
  for at in range(0, (n - 1) // 64 * 64, 64):
    x, y, z, v, w = _mix_block(s, at, x, y, z, v, w, K1, 1)
  mul = (K1 + ((z & 0xFF) << 1)) & MASK
  last = (n - 1) // 64 * 64 + ((n - 1) & 63) - 63
  w = ((w[0] + ((n - 1) & 63)) & MASK, w[1])
  v = ((v[0] + w[0]) & MASK, v[1])
  w = ((w[0] + v[0]) & MASK, w[1])
  x, y, z, v, w = _mix_block(s, last, x, y, z, v, w, mul, 9)
  return _hash_len_16(
    (_hash_len_16(v[0], w[0], mul) + _shift_mix(y) * K0 + z) & MASK, (_hash_len_16(v[1], w[1], mul) + x) & MASK, mul
  )


def _mix_block(
  s: bytes, at: int, x: int, y: int, z: int, v: tuple[int, int], w: tuple[int, int], mul: int, weight: int
) -> tuple[int, int, int, tuple[int, int], tuple[int, int]]:
  """One block of 64 bytes; the last block differs only in the multiplier `mul` and the `weight` 9 instead of 1."""
  x = _ror(x + y + v[0] + _fetch64(s, at + 8), 37) * mul
  y = _ror(y + v[1] + _fetch64(s, at + 48), 42) * mul
  x = (x ^ w[1] * weight) & MASK
  y = (y + v[0] * weight + _fetch64(s, at + 40)) & MASK
  z = _ror(z + w[0], 33) * mul & MASK
  v = _weak_hash_32(s, at, v[1] * mul, (x + w[0]) & MASK)
  w = _weak_hash_32(s, at + 32, (z + w[1]) & MASK, (y + _fetch64(s, at + 16)) & MASK)
  return z, y, x, v, w
