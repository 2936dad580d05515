"""Data whose rows are numbers, without the time that parsing takes."""

import numpy as np

from dlrm_jax.data.encode import Columns
from dlrm_jax.data.index import FileIndex


class Numbers:
  """Stands for a file: rows whose label is the number of the row."""

  def __init__(self, rows, bad=()):
    self.rows = rows
    self.bad = list(bad)
    self.reads = []

  def read(self, start, stop, on_bad_row):
    self.reads.append((start, stop))
    number = np.arange(start, stop)
    zeros = np.zeros(stop - start)
    integers, missing, hashes = [zeros.astype(np.float32)] * 13, zeros.astype(np.uint16), [zeros.astype(np.uint64)] * 26
    return Columns(number, integers, missing, hashes, ~np.isin(number, self.bad))


def counted(rows, bad=()):
  """An index of one such file."""
  return FileIndex([Numbers(rows, bad)])


def numbers(batch):
  """Numbers of a batch's rows, padding left out."""
  return [int(n) for n in batch.label[batch.weight == 1]]
