"""Which rows of a large file train, which evaluate, and which are left out."""

from collections.abc import Callable

import numpy as np

from dlrm_jax.data.schema import DataError

# Rows of a chunk: the random split draws how many of each chunk go where, then which ones.
CHUNK = 16_384

# Where a row goes.
NOWHERE, TRAIN, EVAL = 0, 1, 2

# Rows [start, stop) of the file to `u8[stop - start]`: NOWHERE, TRAIN or EVAL.
Split = Callable[[int, int], np.ndarray]


def time_split(rows: int, train_rows: int, eval_rows: int, seed: int = 0) -> Split:
  """Evenly spread rows in file order: the first `train_rows` of them for training, the rest for evaluation."""
  del seed
  taken = train_rows + eval_rows

  def split(start: int, stop: int) -> np.ndarray:
    # ceil(row * taken / rows) rows are taken before a row. The quotient at `start` is exact, so nothing overflows.
    whole, rest = divmod(start * taken, rows)
    before = whole - (-(rest + np.arange(stop - start + 1) * taken) // rows)
    return np.where(np.diff(before) == 0, NOWHERE, np.where(before[:-1] < train_rows, TRAIN, EVAL)).astype(np.uint8)

  return split


def random_split(rows: int, train_rows: int, eval_rows: int, seed: int = 0) -> Split:
  """Every choice of `train_rows` and `eval_rows` rows is equally likely; a function of the seed and the row numbers.

  Raises:
    DataError: 10^9 rows or more.
  """
  if rows >= 10**9:
    raise DataError(f'--split random takes fewer than 10^9 rows, found {rows}; pass --split time')
  rng = _generator(seed, 0)
  left = np.array([train_rows, eval_rows, rows - train_rows - eval_rows])
  counts = []
  for start in range(0, rows, CHUNK):
    counts.append(rng.multivariate_hypergeometric(left, min(CHUNK, rows - start)))
    left = left - counts[-1]

  def chunk(number: int) -> np.ndarray:
    ordered = np.repeat(np.array([TRAIN, EVAL, NOWHERE], np.uint8), counts[number])
    return _generator(seed, 1 + number).permutation(ordered)

  def split(start: int, stop: int) -> np.ndarray:
    first, last = start // CHUNK, -(-stop // CHUNK)
    return np.concatenate([chunk(i) for i in range(first, last)])[start - first * CHUNK : stop - first * CHUNK]

  return split


def _generator(seed: int, stream: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream))))


SPLITS = {'time': time_split, 'random': random_split}
