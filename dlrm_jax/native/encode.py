"""Columns of numbers to packed rows, in C++ (encode.cc): the same numbers as `data.encode` makes with numpy."""

from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import numpy as np

from dlrm_jax.native import build


def pack(
  label: np.ndarray,
  integers: Sequence[np.ndarray],
  hashes: Sequence[np.ndarray],
  buckets: Sequence[int],
  good: np.ndarray,
  out: np.ndarray,
) -> None:
  """Writes packed rows. Needs `build.load()`.

  Args:
    label: u8[N].
    integers: 13 of f32[N], transformed.
    hashes: 26 of u64[N].
    buckets: 26 numbers of them.
    good: bool[N]; the other rows become 0.
    out: u32[N, width], contiguous; what its columns are is said in data/encode.py.
  """
  label, good = (np.ascontiguousarray(values, np.uint8) for values in (label, good))
  integers = [np.ascontiguousarray(values, np.float32) for values in integers]
  hashes = [np.ascontiguousarray(values, np.uint64) for values in hashes]
  divisors = np.array(buckets, np.uint32)
  at = lambda array: c_void_p(array.ctypes.data)
  each = lambda arrays: (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
  shape = map(c_int64, out.shape)
  build.library().DlrmEncode(*shape, at(label), each(integers), each(hashes), at(divisors), at(good), at(out))
