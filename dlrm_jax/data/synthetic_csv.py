"""Rows to CSV text: fields of fixed width filled from lookup tables, then all padding removed at once."""

import functools

import numpy as np

_FIELD = 9  # a separator and at most eight characters; unused ones are zero bytes
_ROW = 1 + 39 * _FIELD + 1
_TEN_THOUSAND = 10_000
_NEGATIVE = 2 * _TEN_THOUSAND  # places of -9..-1 in the table of digits follow here, in the order -1, -2, ...


@functools.cache
def _hex_digits() -> np.ndarray:
  """u32[65536]: the four hexadecimal digits of each number, as they lie in memory."""
  return np.array([int.from_bytes(f'{i:04x}'.encode(), 'little') for i in range(1 << 16)], np.uint32)


@functools.cache
def _digits() -> np.ndarray:
  """u32[20009]: numbers below 10,000 without leading zeros, then with them, then -1..-9; padded by zero bytes."""
  text = [str(i) for i in range(_TEN_THOUSAND)] + [f'{i:04d}' for i in range(_TEN_THOUSAND)]
  text += [str(-i) for i in range(1, 10)]
  return np.array([int.from_bytes(t.encode(), 'little') for t in text], np.uint32)


def format_rows(label: np.ndarray, integer: np.ndarray, ids: np.ndarray, missing: np.ndarray) -> bytes:
  """CSV lines of label u8[n], integer i32[13, n] (-9 to 99,999,999), ids u32[26, n]; missing bool[39, n] is empty."""
  rows = len(label)
  if not rows:
    return b''
  buffer = np.zeros((rows, _ROW), np.uint8)
  buffer[:, 0] = label + ord('0')
  buffer[:, 1:-1:_FIELD] = ord(',')
  buffer[:, -1] = ord('\n')
  field = np.ndarray((39, rows), np.uint64, buffer, offset=2, strides=(_FIELD, _ROW))
  for i, value in enumerate(integer):
    field[i] = _integer_field(value) * ~missing[i]
  for i, value in enumerate(ids, start=len(integer)):
    field[i] = _hex_field(value) * ~missing[i]
  return buffer.tobytes().translate(None, b'\0')


def _integer_field(value: np.ndarray) -> np.ndarray:
  """u64[n]: up to eight characters of each integer."""
  table = _digits()
  small = np.where(value < 0, _NEGATIVE - 1 - value, value)
  if value.max(initial=0) < _TEN_THOUSAND:
    return table[small].astype(np.uint64)
  big = value >= _TEN_THOUSAND
  high = value // _TEN_THOUSAND
  first = table[np.where(big, high, small)].astype(np.uint64)
  last = table[np.where(big, value - high * _TEN_THOUSAND + _TEN_THOUSAND, 0)].astype(np.uint64)
  return first | ((last * big) << np.uint64(32))


def _hex_field(value: np.ndarray) -> np.ndarray:
  """u64[n]: eight hexadecimal digits of each id."""
  table = _hex_digits()
  high = table[value >> np.uint32(16)].astype(np.uint64)
  return high | (table[value & np.uint32(0xFFFF)].astype(np.uint64) << np.uint64(32))
