"""Names of files to one sequence of numbered rows."""

import bisect
import dataclasses
import functools
import glob
import itertools
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from dlrm_jax.data.csv import index_csv
from dlrm_jax.data.encode import Columns, encode, width
from dlrm_jax.data.parquet import index_parquet
from dlrm_jax.data.schema import DataError, DataSpec


@runtime_checkable
class File(Protocol):
  """What the reader needs of a file."""

  rows: int

  def read(self, start: int, stop: int, on_bad_row: str) -> Columns:
    """Rows [start, stop)."""


@dataclasses.dataclass(frozen=True)
class FileIndex:
  """Files whose rows are counted: row 0 is the first of the first file, in the order of the files' names."""

  files: Sequence[File]

  @functools.cached_property
  def _first(self) -> list[int]:
    """First row of each file, and the end of the last one."""
    return [0, *itertools.accumulate(file.rows for file in self.files)]

  @property
  def rows(self) -> int:
    """Rows of all files."""
    return self._first[-1]

  def read(self, start: int, stop: int, spec: DataSpec, out: np.ndarray | None = None) -> np.ndarray:
    """Packed rows `u32[stop - start, width]` (see `encode`) of rows [start, stop), in `out` if given.

    Raises:
      DataError: there is a bad row, and the spec does not skip them.
    """
    rows = np.empty((stop - start, width(spec.keys)), np.uint32) if out is None else out
    number, at = bisect.bisect_right(self._first, start) - 1, start
    while at < stop:
      end = min(stop, self._first[number + 1])
      columns = self.files[number].read(at - self._first[number], end - self._first[number], spec.on_bad_row)
      encode(columns, spec, rows[at - start : end - start])
      number, at = number + 1, end
    return rows


def index_files(pattern: str, location: str, on_bad_row: str = 'error', native: bool = True) -> FileIndex:
  """Finds the files, counts their rows and looks at the first lines of each.

  Args:
    pattern: names or globs separated by commas, relative to `location` unless absolute.
    location: the folder.
    on_bad_row: 'error' or 'skip'; 'skip' still refuses a file of which all checked lines are bad.
    native: whether C++ may parse CSV.

  Raises:
    DataError: folder or file missing, a file empty or not in the Criteo format.
  """
  return FileIndex([index_file(path, on_bad_row, native) for path in find_files(pattern, location)])


def find_files(pattern: str, location: str) -> list[str]:
  """Paths in the order of their names; see `index_files`."""
  return sorted({path for part in pattern.split(',') for path in _find(part.strip(), location)})


def index_file(path: str, on_bad_row: str, native: bool = True) -> File:
  """One file; see `index_files`."""
  return index_parquet(path) if path.endswith('.parquet') else index_csv(path, on_bad_row, native)


def _find(pattern: str, location: str) -> list[str]:
  if not os.path.isabs(pattern) and not os.path.isdir(location):
    raise DataError(
      f'data_location {location!r} is not a folder; set data_location to the folder with the data, or make it: '
      'python -m dlrm_jax.data.prepare (Criteo) or python -m dlrm_jax.data.synthetic'
    )
  path = os.path.join(location, pattern)
  paths = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
  paths = [path for path in paths if os.path.isfile(path)]
  if not paths:
    folder = os.path.dirname(path) or '.'
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    listed = ', '.join(there[:20]) + (', ...' if len(there) > 20 else '') if there else 'nothing'
    raise DataError(f'no file {pattern!r} in {folder!r}; there is {listed}. {_advice(there)}')
  return paths


def _advice(there: list[str]) -> str:
  if 'train.txt' in there:
    return 'Make train.csv and eval.csv from train.txt: python -m dlrm_jax.data.prepare'
  for name in there:
    if name.endswith(('.parquet', '.csv')):
      return f'Name what is there, such as data.train={name}'
  return 'Set data.train and data.eval to the names of your files, or data_location to their folder'
