"""Names of files to one sequence of numbered rows."""

import dataclasses
import glob
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from dlrm_jax.data.csv import index_csv
from dlrm_jax.data.parquet import index_parquet
from dlrm_jax.data.schema import DataError, DataSpec


@runtime_checkable
class File(Protocol):
  """What the reader needs of a file."""

  rows: int

  def read(self, start: int, stop: int, spec: DataSpec) -> np.ndarray:
    """Packed rows `u32[stop - start, 41]` (see `encode`) of rows [start, stop)."""


@dataclasses.dataclass(frozen=True)
class FileIndex:
  """Files whose rows are counted: row 0 is the first of the first file, in the order of the files' names."""

  files: Sequence[File]

  @property
  def rows(self) -> int:
    """Rows of all files."""
    return sum(file.rows for file in self.files)

  def read(self, start: int, stop: int, spec: DataSpec) -> np.ndarray:
    """Packed rows `u32[stop - start, 41]` (see `encode`) of rows [start, stop); raises `DataError` at a bad row."""
    parts, first = [], 0
    for file in self.files:
      begin, end = max(start - first, 0), min(stop - first, file.rows)
      if begin < end:
        parts.append(file.read(begin, end, spec))
      first += file.rows
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def index_files(pattern: str, location: str, on_bad_row: str = 'error') -> FileIndex:
  """Finds the files, counts their rows and looks at the first lines of each.

  Args:
    pattern: names or globs separated by commas, relative to `location` unless absolute.
    location: the folder.
    on_bad_row: 'error' or 'skip'; 'skip' still refuses a file of which all checked lines are bad.

  Raises:
    DataError: folder or file missing, a file empty or not in the Criteo format.
  """
  paths = sorted({path for part in pattern.split(',') for path in _find(part.strip(), location)})
  return FileIndex(
    [index_parquet(path) if path.endswith('.parquet') else index_csv(path, on_bad_row) for path in paths]
  )


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
