"""Plain rows of CSV to numbers, in C++ (lines.cc), several times as fast as by Arrow's reader and numpy."""

from ctypes import c_int64, c_uint64, c_void_p
from typing import NamedTuple

import numpy as np

from dlrm_jax.native import build

INTEGERS, CATEGORIES = 13, 26  # columns, after the label


class Lines(NamedTuple):
  """Columns of plain rows."""

  label: np.ndarray  # u8[N]
  integers: np.ndarray  # f32[13, N], 0 where there is none
  missing: np.ndarray  # u16[N], bit 0 for I1: 1 where there is none
  hashes: np.ndarray  # u64[26, N], Fingerprint64


def parse(data: bytes, rows: int, empty: int) -> Lines | None:
  """Values of the rows, or None if anything in them is out of the ordinary (see lines.cc). Needs `build.load()`.

  Args:
    data: whole lines.
    rows: how many.
    empty: the hash of a category that is missing.
  """
  lines = Lines(
    np.empty(rows, np.uint8),
    np.empty((INTEGERS, rows), np.float32),
    np.empty(rows, np.uint16),
    np.empty((CATEGORIES, rows), np.uint64),
  )
  arguments = data, c_int64(len(data)), c_int64(rows), c_uint64(empty), *(c_void_p(part.ctypes.data) for part in lines)
  return lines if build.library().DlrmParseLines(*arguments) else None
