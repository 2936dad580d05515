"""Data whose rows are numbers, without the time that parsing takes."""

import numpy as np

from dlrm_jax.data.encode import Columns
from dlrm_jax.data.index import FileIndex


class Numbers:
  """Stands for a file: rows whose I1 is the number of the row."""

  def __init__(self, rows, bad=()):
    self.rows = rows
    self.bad = list(bad)
    self.reads = []

  def read(self, start, stop, on_bad_row):
    self.reads.append((start, stop))
    number = np.arange(start, stop)
    zeros = np.zeros(stop - start)
    integers = [values.astype(np.float32) for values in (number, *[zeros] * 12)]
    missing, hashes = zeros.astype(np.uint16), [zeros.astype(np.uint64)] * 26
    return Columns(zeros.astype(np.uint8), integers, missing, hashes, ~np.isin(number, self.bad))


def counted(rows, bad=()):
  """An index of one such file."""
  return FileIndex([Numbers(rows, bad)])


def numbers(batch):
  """Numbers of a batch's rows, padding left out. They went through the transform log."""
  return np.rint(np.expm1(batch.dense[batch.weight == 1, 0])).astype(int).tolist()
