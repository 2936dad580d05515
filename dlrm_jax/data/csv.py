"""One CSV file: an index of its lines, and the parsed columns of any range of them.

Plain rows are parsed in C++ where it can be had (`native.lines`), all others by Arrow's reader, a range at once; only
where that refuses is the range looked at line by line (`bad_rows`).
"""

import dataclasses
import functools
import logging
import os

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from dlrm_jax.data import bad_rows
from dlrm_jax.data.encode import MISSING_HASH, Columns, spread, to_columns
from dlrm_jax.data.schema import CATEGORIES, COLUMNS, INTEGERS, LABEL, DataError
from dlrm_jax.native import build, lines

# The index keeps one count a block; finding a row scans one block.
BLOCK = 1 << 18

# Arrow parses a range in pieces of this size: they fit the second-level cache, which makes it half as fast again.
PARSE_BYTES = 1 << 18

# Lines that are checked before training starts.
CHECKED_LINES = 100


@dataclasses.dataclass(frozen=True)
class CsvFile:
  """A CSV file whose lines have been counted.

  Attributes:
    path: the file.
    size: its bytes without blank lines at the end.
    rows: its lines; line r + 1 is row r.
    newlines: `i64[blocks + 1]`, how many line feeds come before each block.
    native: whether C++ parses its plain rows.
  """

  path: str
  size: int
  rows: int
  newlines: np.ndarray
  native: bool

  def read(self, start: int, stop: int, on_bad_row: str) -> Columns:
    """Rows [start, stop); raises `DataError` at a bad row, or marks it."""
    with open(self.path, 'rb', buffering=0) as file:
      if os.fstat(file.fileno()).st_size < self.size:
        raise self._changed()
      begin = self._offset(file.fileno(), start)
      data = _pread(file.fileno(), begin, self._offset(file.fileno(), stop) - begin)
    plain = lines.parse(data, stop - start, MISSING_HASH) if self.native else None
    if plain:
      return Columns(plain.label, list(plain.integers), plain.missing, list(plain.hashes), np.ones(stop - start, bool))
    columns = None if _is_odd(data) else _parse(data, stop - start)
    return self._read_slowly(data, start, stop, on_bad_row) if columns is None else to_columns(columns)

  def _offset(self, descriptor: int, row: int) -> int:
    """Where a row begins in the file."""
    if row in (0, self.rows):
      return self.size if row else 0
    block = int(np.searchsorted(self.newlines, row)) - 1
    begin = block * BLOCK
    data = np.frombuffer(_pread(descriptor, begin, min(BLOCK, self.size - begin)), np.uint8)
    ends = np.flatnonzero(data == ord('\n'))
    if len(ends) != self.newlines[block + 1] - self.newlines[block]:
      raise self._changed()
    return begin + int(ends[row - self.newlines[block] - 1]) + 1

  def _changed(self) -> DataError:
    return DataError(f'{self.path} was changed since its lines were counted; start again')

  def _read_slowly(self, data: bytes, start: int, stop: int, on_bad_row: str) -> Columns:
    """`read` for rows that Arrow refuses: finds the bad lines exactly and parses the others."""
    texts = data.removesuffix(b'\n').split(b'\n')
    if len(texts) != stop - start:
      raise self._changed()
    cut = stop == self.rows and not data.endswith(b'\n')
    faults = [
      bad_rows.fault(line, first=start + i == 0, cut=cut and i == len(texts) - 1) for i, line in enumerate(texts)
    ]
    join = lambda: b''.join(line + b'\n' for line, fault in zip(texts, faults, strict=True) if not fault)
    columns = _parse(join(), faults.count(None))
    if columns is None:
      faults = [fault or _refused(line) for line, fault in zip(texts, faults, strict=True)]
      columns = _parse(join(), faults.count(None))
    good = np.array([not fault for fault in faults])
    if not good.all():
      bad = int(np.argmin(good))
      message = f'{self.path}, line {start + bad + 1}, {faults[bad]}'
      if on_bad_row == 'error':
        raise DataError(f"{message} (or set data.on_bad_row='skip' to leave such rows out)")
      _say_skipped(message)
    if columns is None:
      raise DataError(
        f'{self.path}, lines {start + 1} to {stop}: the CSV reader refuses them together, though each alone is good; '
        'write numbers as plain digits'
      )
    return spread(to_columns(columns), good)


@functools.cache
def _say_skipped(message: str) -> None:
  """Once, though every epoch finds the row again."""
  logging.getLogger(__name__).warning('skipped: %s', message)


def index_csv(path: str, on_bad_row: str, native: bool = True) -> CsvFile:
  """Counts the lines of a CSV file and checks its first ones and its last. `native`: whether C++ may parse it.

  Raises:
    DataError: the file is empty, or a checked line is bad; where bad rows are skipped, only if all of the first are.
  """
  with open(path, 'rb', buffering=0) as file:
    descriptor = file.fileno()
    size = _size_without_blank_end(descriptor)
    if size == 0:
      raise DataError(f'{path} is empty; write it again (python -m dlrm_jax.data.prepare makes it from train.txt)')
    counts = [_pread(descriptor, at, min(BLOCK, size - at)).count(b'\n') for at in range(0, size, BLOCK)]
    newlines = np.cumsum([0, *counts], dtype=np.int64)
    rows = int(newlines[-1]) + (_pread(descriptor, size - 1, 1) != b'\n')
    indexed = CsvFile(path, size, rows, newlines, native and build.load().ready)
    head = _pread(descriptor, 0, indexed._offset(descriptor, min(CHECKED_LINES, rows)))
    begin = indexed._offset(descriptor, rows - 1)
    tail = _pread(descriptor, begin, size - begin)
  _check(indexed, head, tail, on_bad_row)
  return indexed


def _check(indexed: CsvFile, head: bytes, tail: bytes, on_bad_row: str) -> None:
  """Raises for the first bad line of `head` and `tail`; where bad rows are skipped, only if nothing else is there."""
  texts = head.removesuffix(b'\n').split(b'\n')
  cut = not tail.endswith(b'\n')
  faults = [bad_rows.fault(line, first=i == 0, cut=cut and i == indexed.rows - 1) for i, line in enumerate(texts)]
  rows = [i for i, fault in enumerate(faults) if fault]
  if rows and (on_bad_row == 'error' or len(rows) == len(texts)):
    raise DataError(f'{indexed.path}, line {rows[0] + 1}, {faults[rows[0]]}')
  if on_bad_row == 'error':
    fault = bad_rows.fault(tail.removesuffix(b'\n'), first=indexed.rows == 1, cut=cut)
    if fault:
      raise DataError(f'{indexed.path}, line {indexed.rows}, {fault}')


def _is_odd(data: bytes) -> bool:
  """Whether there may be something in it that Arrow takes, though it is not good."""
  # A quote that does not close is taken as part of an id at the end of what Arrow is given.
  if b'\0' in data or (b'"' in data and data.count(b'"') % 2):
    return True
  return bad_rows.has_hexadecimal(data)


def _refused(line: bytes) -> str | None:
  """For a line in which `bad_rows` finds no fault, though one of those that it is read with has one."""
  return None if _parse(line + b'\n', 1) else 'which the CSV reader refuses; write numbers as plain digits'


def _pread(descriptor: int, offset: int, size: int) -> bytes:
  """Bytes [offset, offset + size) of a file, in as many reads as it takes; fewer at its end."""
  parts = []
  while size > 0 and (part := os.pread(descriptor, size, offset)):
    parts.append(part)
    offset += len(part)
    size -= len(part)
  return parts[0] if len(parts) == 1 else b''.join(parts)


def _size_without_blank_end(descriptor: int) -> int:
  """Bytes of the file up to the end of the last line that is not blank, its line feed included."""
  size = os.fstat(descriptor).st_size
  while size > 0:
    begin = max(size - BLOCK, 0)
    block = _pread(descriptor, begin, size - begin)
    text = block.rstrip(b' \r\n')
    if text:
      line_end = block.find(b'\n', len(text))
      return begin + (line_end + 1 if line_end >= 0 else len(block))
    size = begin
  return 0


def _parse(data: bytes, rows: int) -> list[pa.Array] | None:
  """The 40 columns, numbers as int64 or else as float64; None if a line is bad."""
  if not rows:
    return [pa.array([], pa.string() if name in CATEGORIES else pa.int64()) for name in COLUMNS]
  for number in (pa.int64(), pa.float64()):
    try:
      table = arrow_csv.read_csv(
        pa.BufferReader(data),
        arrow_csv.ReadOptions(use_threads=False, block_size=PARSE_BYTES, column_names=COLUMNS),
        arrow_csv.ParseOptions(ignore_empty_lines=False),
        arrow_csv.ConvertOptions(
          column_types=dict.fromkeys((LABEL, *INTEGERS), number) | dict.fromkeys(CATEGORIES, pa.string()),
          null_values=[''],
          strings_can_be_null=False,
          check_utf8=not data.isascii(),  # ASCII is UTF-8, and much faster to see
        ),
      )
    except pa.ArrowInvalid:
      continue
    columns = [column.combine_chunks() for column in table.columns]
    if len(table) == rows and _valid(columns):
      return columns
  return None


def _valid(columns: list[pa.Array]) -> bool:
  """Whether the labels are 0 and 1 and the numbers fit 64 bits (only floats can be infinite, NaN or beyond)."""
  label, numbers = columns[0], columns[1 : 1 + len(INTEGERS)]
  if label.null_count or not np.isin(label.to_numpy(), (0, 1)).all():
    return False
  return pa.types.is_integer(label.type) or all(
    (np.abs(column.drop_null().to_numpy()) < 2.0**63).all() for column in numbers
  )
