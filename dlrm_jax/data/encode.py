"""Arrow columns to numbers to packed rows to a `Batch`: the transform of the integers, the buckets of the categories.

`Columns` are all that is parsed, whatever the model makes of it. A packed row is `u32[41]`: bits of the label, of 13
floats, 26 buckets, bits of the weight; with keys it is `u32[93]`, 26 pairs of a fingerprint's low and high half behind.
Rows in one piece make shuffling and interleaving one copy each.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dlrm_jax.data.schema import CATEGORIES, DENSE_MIN, DENSE_RANGE, INTEGERS, MISSING, DataSpec
from dlrm_jax.embeddings.hashing import fingerprint64, fingerprint64_strings
from dlrm_jax.native import build
from dlrm_jax.native import encode as native
from dlrm_jax.structs import Batch

DENSE = slice(1, 1 + len(INTEGERS))
BUCKET = slice(DENSE.stop, DENSE.stop + len(CATEGORIES))
WEIGHT = BUCKET.stop
WIDTH = WEIGHT + 1
KEY = slice(WIDTH, WIDTH + 2 * len(CATEGORIES))

MISSING_HASH = fingerprint64(MISSING)


class Columns(NamedTuple):
  """Parsed rows, column by column."""

  label: np.ndarray  # u8[N], 0 or 1
  integers: Sequence[np.ndarray]  # 13 of f32[N], 0 where there is none
  missing: np.ndarray  # u16[N], bit 0 for I1: 1 where there is none
  hashes: Sequence[np.ndarray]  # 26 of u64[N], Fingerprint64 of the string
  good: np.ndarray  # bool[N]; False marks a bad row, whose other values mean nothing


def _log(x: np.ndarray, column: int) -> np.ndarray:
  del column
  y = np.abs(x)
  np.log1p(y, out=y)
  return np.copysign(y, x, out=y)


def _minmax(x: np.ndarray, column: int) -> np.ndarray:
  return (x - np.float32(DENSE_MIN[column])) / np.float32(DENSE_RANGE[column])


def _none(x: np.ndarray, column: int) -> np.ndarray:
  del column
  return x


# Each transform of f32[N] and the number of its column (0 for I1), with the integers that it takes to 0: missing ones
# become those, and so 0 afterwards.
TRANSFORMS: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], tuple[int, ...]]] = {
  'log': (_log, (0,) * len(INTEGERS)),
  'minmax': (_minmax, DENSE_MIN),
  'none': (_none, (0,) * len(INTEGERS)),
}


def width(keys: bool) -> int:
  """Numbers of a packed row."""
  return KEY.stop if keys else WIDTH


def to_columns(arrays: Sequence[pa.Array]) -> Columns:
  """Good rows from label (no nulls), 13 numeric and 26 string arrays of length N."""
  missing = np.zeros(len(arrays[0]), np.uint16)
  for i, array in enumerate(arrays[DENSE]):
    if array.null_count:
      missing |= array.is_null().to_numpy(zero_copy_only=False).astype(np.uint16) << i
  return Columns(
    label=arrays[0].to_numpy(zero_copy_only=False).astype(np.uint8),
    # First to double: if there is a fraction in the column, Arrow has done so already, and a row must not depend on
    # the rows that it is read with.
    integers=[
      array.fill_null(0).to_numpy(zero_copy_only=False).astype(float).astype(np.float32) for array in arrays[DENSE]
    ],
    missing=missing,
    # Nulls and empty strings are the id of a single space.
    hashes=[fingerprint64_strings(array, empty=MISSING_HASH) for array in arrays[BUCKET]],
    good=np.ones(len(arrays[0]), bool),
  )


def spread(columns: Columns, good: np.ndarray) -> Columns:
  """Columns of the good rows to columns of all rows `bool[N]`, with zeros in the bad ones."""

  def spread_one(values: np.ndarray) -> np.ndarray:
    out = np.zeros(len(good), values.dtype)
    out[good] = values
    return out

  integers, hashes = (list(map(spread_one, part)) for part in (columns.integers, columns.hashes))
  return Columns(spread_one(columns.label), integers, spread_one(columns.missing), hashes, good)


def encode(columns: Columns, spec: DataSpec, out: np.ndarray | None = None) -> np.ndarray:
  """Packed rows `u32[N, width]`, in `out` if given: of weight 1, a missing integer 0; bad rows are all 0."""
  rows = np.empty((len(columns.label), width(spec.keys)), np.uint32) if out is None else out
  transform, zero = TRANSFORMS[spec.dense_transform]
  integers = [
    transform(np.where(columns.missing & (1 << i), np.float32(zero[i]), column) if zero[i] else column, i)
    for i, column in enumerate(columns.integers)
  ]
  if spec.native and build.load().ready:
    native.pack(columns.label, integers, columns.hashes, spec.buckets, columns.good, rows)
  else:
    _pack(columns, integers, spec, rows)
  return rows


def _pack(columns: Columns, integers: Sequence[np.ndarray], spec: DataSpec, rows: np.ndarray) -> None:
  """What `native.pack` does, with numpy."""
  floats = rows.view(np.float32)
  floats[:, 0] = columns.label
  floats[:, WEIGHT] = 1
  for i, column in enumerate(integers, DENSE.start):
    floats[:, i] = column
  quotient = np.empty(len(rows), np.uint64)
  for i, (hashes, buckets) in enumerate(zip(columns.hashes, spec.buckets, strict=True), BUCKET.start):
    # numpy divides by a constant with SIMD multiplications; its remainder does not, and takes twice as long as this.
    np.floor_divide(hashes, np.uint64(buckets), out=quotient)
    quotient *= np.uint64(buckets)
    np.subtract(hashes, quotient, out=quotient)
    rows[:, i] = quotient
  if spec.keys:
    for i, hashes in enumerate(columns.hashes):
      at = KEY.start + 2 * i
      rows[:, at : at + 2] = hashes.astype('<u8', copy=False).view('<u4').reshape(-1, 2)
  if not columns.good.all():
    rows[~columns.good] = 0


def to_batch(rows: np.ndarray, size: int) -> Batch:
  """Packed rows, n <= size, to a `Batch` of `size` examples in memory of its own, padded with weight 0."""
  batch = new_batch(size, rows.shape[1] == KEY.stop)
  fill(batch, slice(len(rows)), rows)
  pad(batch, len(rows))
  return batch


def new_batch(size: int, keys: bool = False) -> Batch:
  """A batch whose values are undefined."""
  return Batch(
    label=np.empty(size, np.float32),
    dense=np.empty((size, len(INTEGERS)), np.float32),
    bucket=np.empty((size, len(CATEGORIES)), np.uint32),
    weight=np.empty(size, np.float32),
    key=np.empty((size, len(CATEGORIES), 2), np.uint32) if keys else None,
  )


def fill(batch: Batch, at: Any, rows: np.ndarray) -> None:
  """Copies packed rows `u32[..., width]` into the examples of a batch at a numpy index."""
  floats = rows.view(np.float32)
  batch.label[at] = floats[..., 0]
  batch.dense[at] = floats[..., DENSE]
  batch.bucket[at] = rows[..., BUCKET]
  batch.weight[at] = floats[..., WEIGHT]
  if batch.key is not None:
    batch.key[at] = rows[..., KEY].reshape(*rows.shape[:-1], len(CATEGORIES), 2)


def pad(batch: Batch, at: int) -> None:
  """Zeros the examples from `at` on."""
  for values in (batch.label, batch.dense, batch.bucket, batch.weight, batch.key):
    if values is not None:
      values[at:] = 0
