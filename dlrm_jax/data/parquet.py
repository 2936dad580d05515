"""One Parquet file: the columns of any range of rows, read forward in bounded memory.

Reading starts only at row groups, so a reader is parked at the row where it stopped: the windows of a stream follow one
another, and each goes on where the one before it ended. Files with row groups of about 100,000 rows start fastest.
"""

import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import compute
from pyarrow import parquet as arrow_parquet

from dlrm_jax.data.encode import BUCKET, DENSE, Columns, to_columns
from dlrm_jax.data.schema import CATEGORIES, COLUMNS, INTEGERS, LABEL, DataError

# Rows that are decoded at once, and bytes that are read at once of each column.
DECODE_ROWS = 8192
READ_BYTES = 1 << 16

# More parked readers than this are closed, the one that has waited longest first.
PARKED = 32


class ParquetFile:
  """A Parquet file whose schema has been checked. Its reads may come from several threads.

  Attributes:
    path: the file.
    rows: its rows.
  """

  def __init__(self, path: str, columns: Sequence[str], metadata: arrow_parquet.FileMetaData) -> None:
    self.path, self._columns, self._metadata = path, list(columns), metadata
    self._groups = np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])
    self.rows = int(self._groups[-1])
    self._parked: list[_Reader] = []
    self._lock = threading.Lock()

  def read(self, start: int, stop: int, on_bad_row: str) -> Columns:
    """Rows [start, stop); raises `DataError` at a bad row, or marks it."""
    try:
      reader = self._take_reader(start)
      columns = reader.read(start, stop)
    except (pa.ArrowException, OSError, StopIteration) as error:
      why = ' '.join(str(error).split())
      raise DataError(f'{self.path} cannot be read, it is damaged or was changed ({why}); write it again') from error
    self._park(reader)
    numbers = [_number(column) for column in columns[: DENSE.stop]]
    faults = _faults(numbers)
    bad = np.flatnonzero(faults.any(axis=0))
    if len(bad):
      self._report(int(np.argmax(faults[:, bad[0]])), int(bad[0]), start, columns, on_bad_row)
    with np.errstate(over='ignore', invalid='ignore'):  # of bad rows
      parsed = to_columns([_filled(numbers[0]), *numbers[DENSE], *map(_string, columns[BUCKET])])
    parsed.good[bad] = False
    return parsed

  def _report(self, field: int, at: int, start: int, columns: list[pa.Array], on_bad_row: str) -> None:
    """Raises or logs what is wrong with the row at `at` of the columns."""
    message = (
      f'{self.path}, row {start + at + 1}, field {COLUMNS[field]}: found {columns[field][at].as_py()!r}, '
      f'{"which does not fit 64 bits" if field else "expected 0 or 1"}; correct or remove the row'
    )
    if on_bad_row == 'error':
      raise DataError(f"{message} (or set data.on_bad_row='skip' to leave such rows out)")
    logging.getLogger(__name__).warning('skipped: %s', message)

  def _take_reader(self, start: int) -> '_Reader':
    """The parked reader that has the least to pass over, else one at the beginning of the row's group."""
    group = int(np.searchsorted(self._groups, start, side='right')) - 1
    with self._lock:
      near = [reader for reader in self._parked if self._groups[group] <= reader.row <= start]
      if near:
        best = max(near, key=lambda reader: reader.row)
        self._parked.remove(best)
        return best
    return _Reader(self.path, self._columns, self._metadata, group, int(self._groups[group]))

  def _park(self, reader: '_Reader') -> None:
    """Keeps a reader for the rows that follow; closes it if there are none, or the oldest if there are too many."""
    with self._lock:
      if reader.row < self.rows:
        self._parked.append(reader)
        reader = self._parked.pop(0) if len(self._parked) > PARKED else None
    if reader:
      reader.close()


class _Reader:
  """An open file at row `row`, which only moves forward."""

  def __init__(self, path: str, columns: list[str], metadata: arrow_parquet.FileMetaData, group: int, row: int) -> None:
    self.row = row
    # Without a buffer size, and with pre-buffering, whole columns of a row group would be held in memory; and every
    # reader would have its own copy of the metadata, which is large for a file of many groups.
    self._file = arrow_parquet.ParquetFile(path, metadata=metadata, buffer_size=READ_BYTES, pre_buffer=False)
    self._columns = columns
    self._batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
      DECODE_ROWS, range(group, self._file.num_row_groups), columns, use_threads=False
    )
    self._held: pa.RecordBatch | None = None

  def read(self, start: int, stop: int) -> list[pa.Array]:
    """The columns of rows [start, stop), start >= `row`."""
    parts = []
    while self.row < stop:
      batch = self._held if self._held is not None else next(self._batches)
      skip = min(max(start - self.row, 0), len(batch))
      take = min(stop - self.row - skip, len(batch) - skip)
      if take:
        parts.append(batch.slice(skip, take).select(self._columns))
      rest = batch.slice(skip + take)
      self._held = rest if len(rest) else None
      self.row += skip + take
    return [column.combine_chunks() for column in pa.Table.from_batches(parts).columns]

  def close(self) -> None:
    self._file.close()


def index_parquet(path: str) -> ParquetFile:
  """Reads a file's metadata and checks its columns.

  Columns are found by name (label, I1 to I13, C1 to C26), in any order and among others; or else by position, where
  there are 40 of them.

  Raises:
    DataError: no Parquet file, no rows, columns missing or of a wrong type.
  """
  try:
    with arrow_parquet.ParquetFile(path) as file:
      metadata, schema = file.metadata, file.schema_arrow
  except (pa.ArrowInvalid, OSError) as error:
    raise DataError(f'{path} cannot be read as Parquet ({error}); write it again') from error
  if metadata.num_rows == 0:
    raise DataError(f'{path} is empty; write it again (python -m dlrm_jax.data.prepare makes it from train.txt)')
  columns = _find_columns(path, schema.names)
  for name, column in zip(COLUMNS, columns, strict=True):
    found = schema.field(column).type
    expected = _expected_type(name, found)
    if expected:
      raise DataError(f'{path}, field {name}: column {column!r} has type {found}, expected {expected}; convert it')
  return ParquetFile(path, columns, metadata)


def _find_columns(path: str, names: list[str]) -> Sequence[str]:
  missing = [name for name in COLUMNS if name not in names]
  if not missing:
    return COLUMNS
  in_place = all(names[i] == name for i, name in enumerate(COLUMNS) if name in names) if len(names) == 40 else False
  if in_place and len(set(names)) == len(names):
    return names
  raise DataError(
    f'{path}, field {missing[0]}: {len(missing)} of the columns {LABEL}, I1 to I13, C1 to C26 are missing '
    f'({", ".join(missing[:5])}{", ..." if len(missing) > 5 else ""}); found {len(names)} columns: '
    f'{", ".join(names[:5])}{", ..." if len(names) > 5 else ""}. Rename them, or write just the 40 in this order'
  )


def _expected_type(name: str, found: pa.DataType) -> str | None:
  """What a column should be if its type is wrong; None if it is right."""
  types = pa.types
  if name in CATEGORIES:
    value = found.value_type if types.is_dictionary(found) else found
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
    return None if any(test(value) for test in tests) or str(value) == 'string_view' else 'strings'
  number = types.is_integer(found) or types.is_floating(found) or types.is_decimal(found)
  if name in INTEGERS:
    return None if number or types.is_null(found) else 'integers (or floats)'
  return None if number or types.is_boolean(found) else 'integers 0 and 1'


def _number(column: pa.Array) -> pa.Array:
  """Integers stay, everything else becomes float64; NaN, which is how pandas may write a missing integer, is null."""
  if pa.types.is_integer(column.type):
    return column
  column = column.cast(pa.int8() if pa.types.is_boolean(column.type) else pa.float64())
  if not pa.types.is_floating(column.type):
    return column
  return compute.if_else(compute.is_nan(column), pa.scalar(None, pa.float64()), column)


def _filled(label: pa.Array) -> pa.Array:
  return label.fill_null(0)


def _string(column: pa.Array) -> pa.Array:
  if pa.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  return column.cast(pa.string()) if pa.types.is_null(column.type) or str(column.type) == 'string_view' else column


def _faults(numbers: list[pa.Array]) -> np.ndarray:
  """`bool[14, N]`: which labels are not 0 or 1, and which integers do not fit 64 bits."""
  label = numbers[0]
  faults = np.zeros((len(numbers), len(label)), bool)
  faults[0] = ~np.isin(_filled(label).to_numpy(zero_copy_only=False), (0, 1)) | label.is_null().to_numpy(False)
  for fault, column in zip(faults[1:], numbers[1:], strict=True):
    if pa.types.is_floating(column.type) or pa.types.is_uint64(column.type):
      values = column.fill_null(0).to_numpy(zero_copy_only=False)
      fault[:] = ~(np.abs(values) < 2**63)
  return faults
