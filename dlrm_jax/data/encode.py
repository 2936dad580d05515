"""Arrow columns to packed rows to a `Batch`: the transform of the integers and the buckets of the categories.

A packed row is `u32[41]`: bits of the label, of 13 floats, 26 buckets, bits of the weight. Rows in one piece make
shuffling and interleaving one copy each.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from dlrm_jax.data.schema import CATEGORIES, DENSE_MIN, DENSE_RANGE, INTEGERS, MISSING, DataSpec
from dlrm_jax.embeddings.hashing import fingerprint64, fingerprint64_strings
from dlrm_jax.structs import Batch

DENSE = slice(1, 1 + len(INTEGERS))
BUCKET = slice(DENSE.stop, DENSE.stop + len(CATEGORIES))
WEIGHT = BUCKET.stop
WIDTH = WEIGHT + 1

_MISSING_HASH = fingerprint64(MISSING)


def _log(x: np.ndarray) -> np.ndarray:
  return np.copysign(np.log1p(np.abs(x)), x)


def _minmax(x: np.ndarray) -> np.ndarray:
  return (x - np.array(DENSE_MIN, np.float32)) / np.array(DENSE_RANGE, np.float32)


def _none(x: np.ndarray) -> np.ndarray:
  return x


# Each transform of f32[N, 13] with the integers that it takes to 0: missing ones become those, and so 0 afterwards.
TRANSFORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[int, ...]]] = {
  'log': (_log, (0,) * len(INTEGERS)),
  'minmax': (_minmax, DENSE_MIN),
  'none': (_none, (0,) * len(INTEGERS)),
}


def encode(columns: Sequence[pa.Array], spec: DataSpec) -> np.ndarray:
  """Packed rows `u32[N, 41]` of weight 1 from label (no nulls), 13 numeric and 26 string arrays of length N."""
  rows = np.empty((len(columns[0]), WIDTH), np.uint32)
  floats = rows.view(np.float32)
  floats[:, 0] = columns[0].to_numpy(zero_copy_only=False)
  floats[:, WEIGHT] = 1
  floats[:, DENSE] = transform(columns[DENSE], spec.dense_transform)
  for i, (column, buckets) in enumerate(zip(columns[BUCKET], spec.buckets, strict=True), BUCKET.start):
    rows[:, i] = bucket(column, buckets)
  return rows


def transform(columns: Sequence[pa.Array], name: str) -> np.ndarray:
  """Thirteen numeric arrays to `f32[N, 13]`; a null is 0 after the transform."""
  function, zero = TRANSFORMS[name]
  dense = np.empty((len(columns[0]), len(columns)), np.float32)
  for i, column in enumerate(columns):
    dense[:, i] = column.fill_null(zero[i]).to_numpy(zero_copy_only=False)
  return function(dense)


def bucket(strings: pa.Array, buckets: int) -> np.ndarray:
  """Fingerprint64 mod `buckets`, `u64[N]`; nulls and empty strings are the id of a single space."""
  hashes = fingerprint64_strings(strings, empty=_MISSING_HASH)
  # numpy divides by a constant with SIMD multiplications; its remainder does not, and takes twice as long as this.
  quotient = hashes // np.uint64(buckets)
  quotient *= np.uint64(buckets)
  hashes -= quotient
  return hashes


def to_batch(rows: np.ndarray, size: int) -> Batch:
  """Packed rows `u32[n, 41]`, n <= size, to a `Batch` of `size` examples in memory of its own, padded with weight 0."""

  def padded(values: np.ndarray) -> np.ndarray:
    out = np.empty((size, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    out[len(values) :] = 0
    return out

  floats = rows.view(np.float32)
  return Batch(
    label=padded(floats[:, 0]),
    dense=padded(floats[:, DENSE]),
    bucket=padded(rows[:, BUCKET]),
    weight=padded(floats[:, WEIGHT]),
  )
