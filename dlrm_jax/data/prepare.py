"""`python -m dlrm_jax.data.prepare`: the Kaggle train.txt to train.csv and eval.csv (or Parquet), in constant memory.

The file is read twice, a megabyte at a time: once to count its rows, once to check and copy them. Where it has
more rows than asked for, they are taken evenly from the whole file: the first ten million of Kaggle's seven days would
be a day and a half, and the last two million of those a few hours, too few to say how good a model is on other days.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet as arrow_parquet
from tqdm import tqdm

from dlrm_jax.data import bad_rows
from dlrm_jax.data.schema import CATEGORIES, COLUMNS, INTEGERS, LABEL, DataError
from dlrm_jax.data.split import EVAL, SPLITS, TRAIN, Split

# Bytes that are read at once: also the longest line.
BLOCK = 1 << 20

# Rows of a Parquet row group.
ROW_GROUP = 65_536

NAMES = {TRAIN: 'train', EVAL: 'eval'}

KAGGLE = 'https://www.kaggle.com/c/criteo-display-ad-challenge'

_NUMBERS = (LABEL, *INTEGERS)
_TYPES = {LABEL: pa.int8()} | dict.fromkeys(INTEGERS, pa.int64()) | dict.fromkeys(CATEGORIES, pa.string())
_TO_COMMAS = bytes.maketrans(b'\t', b',')
_FORBIDDEN = (b',', b'"', b'\r', b'\0')


class Rows(NamedTuple):
  """Checked rows: tab-separated lines that end in a line feed, and the same as columns (CSV needs only the numbers)."""

  text: bytes
  table: pa.Table


class CsvWriter:
  """Writes rows as comma-separated lines."""

  columns = _NUMBERS

  def __init__(self, path: str) -> None:
    self._file = open(path, 'wb')  # noqa: SIM115 (closed by `close`)

  def write(self, rows: Rows, chosen: np.ndarray) -> None:
    """Appends the rows where `chosen`, `bool[N]`, is true."""
    text = np.frombuffer(rows.text, np.uint8)
    ends = np.flatnonzero(text == ord('\n')) + 1
    self._file.write(text[np.repeat(chosen, np.diff(ends, prepend=0))].tobytes().translate(_TO_COMMAS))

  def close(self) -> None:
    self._file.close()


class ParquetWriter:
  """Writes rows as Parquet: label int8, I1..I13 int64, C1..C26 string; empty fields are null."""

  columns = COLUMNS

  def __init__(self, path: str) -> None:
    self._writer = arrow_parquet.ParquetWriter(path, pa.schema(_TYPES), compression='zstd')
    self._waiting = pa.schema(_TYPES).empty_table()

  def write(self, rows: Rows, chosen: np.ndarray) -> None:
    """Appends the rows where `chosen`, `bool[N]`, is true."""
    self._waiting = pa.concat_tables([self._waiting, rows.table.filter(pa.array(chosen))])
    while len(self._waiting) >= ROW_GROUP:
      self._writer.write_table(self._waiting.slice(0, ROW_GROUP))
      self._waiting = self._waiting.slice(ROW_GROUP).combine_chunks()

  def close(self) -> None:
    if len(self._waiting):
      self._writer.write_table(self._waiting)
    self._writer.close()


WRITERS = {'csv': CsvWriter, 'parquet': ParquetWriter}


def prepare(
  source: str = './data/train.txt',
  out: str = './data',
  file_format: str = 'csv',
  train_rows: int = 8_000_000,
  eval_rows: int = 2_000_000,
  split: str = 'time',
  seed: int = 0,
  force: bool = False,
) -> dict:
  """Writes `out`/train and `out`/eval, with the ending `file_format`; both appear at the end, or neither.

  Args:
    source: tab-separated lines of label, I1..I13, C1..C26 without a header.
    out: a folder; made if missing.
    file_format: 'csv' or 'parquet'.
    train_rows: rows of the training file; 0 for all but `eval_rows`.
    eval_rows: rows of the evaluation file, at least 1.
    split: 'time' or 'random'; both files keep the order of `source`.
    seed: of the random split; the same seed and rows give the same bytes.
    force: whether to write over files that are there.

  Returns:
    What `main` prints: rows, click rates and paths.

  Raises:
    DataError: `source` is missing, not in that format or has too few rows, or a file is in the way.
  """
  if not os.path.isfile(source):
    raise DataError(f'no file {source!r}; get the data from {KAGGLE}, unpack it, and pass --input PATH/train.txt')
  paths = {part: os.path.join(out, f'{name}.{file_format}') for part, name in NAMES.items()}
  in_the_way = [path for path in paths.values() if os.path.exists(path)]
  if in_the_way and not force:
    raise DataError(f'{" and ".join(in_the_way)} would be overwritten; pass --force to do so, or another --out')
  os.makedirs(out, exist_ok=True)
  with tqdm(total=2 * os.path.getsize(source), unit='B', unit_scale=True, disable=None) as bar:
    rows = _count_rows(source, bar.update)
    train_rows, eval_rows = _sizes(source, rows, train_rows, eval_rows)
    chosen = SPLITS[split](rows, train_rows, eval_rows, seed)
    clicks = _copy(source, rows, chosen, WRITERS[file_format], paths, bar.update)
  sizes = {TRAIN: train_rows, EVAL: eval_rows}
  result = {'input': source, 'input_rows': rows}
  for part, name in NAMES.items():
    result |= {name: paths[part], f'{name}_rows': sizes[part], f'{name}_click_rate': clicks[part] / sizes[part]}
  return result


def _sizes(source: str, rows: int, train_rows: int, eval_rows: int) -> tuple[int, int]:
  """Rows of both files, at least one each; raises if there are fewer."""
  fifth = max(rows // 5, 1)
  if rows < (train_rows or 1) + eval_rows:
    raise DataError(
      f'{source} has {rows} rows, but train_rows={train_rows or "the rest"} and eval_rows={eval_rows} are wanted; '
      + (f'pass --train_rows 0 --eval_rows {fifth} for all of it, split 4 to 1' if rows > 1 else 'it needs two or more')
    )
  return train_rows or rows - eval_rows, eval_rows


def _count_rows(path: str, progress: Callable[[int], object]) -> int:
  """Lines of a file, having checked those of its first block, so that the wrong file is seen at once."""
  rows, end = 0, b'\n'
  for block in _blocks(path, progress):
    if not rows:
      _parse(path, block, 0, _NUMBERS)
    rows += _line_feeds(block)
    end = block[-1:]
  rows += end != b'\n'
  if not rows:
    raise DataError(f'{path} is empty; unpack it again from the archive of {KAGGLE}')
  return rows


def _copy(
  source: str, rows: int, split: Split, writer: type, paths: dict[int, str], progress: Callable[[int], object]
) -> dict[int, int]:
  """Writes both files and returns their clicks. Until all is done they have names that no reader looks for."""
  clicks, done = dict.fromkeys(paths, 0), 0
  partial = {part: f'{path}.partial' for part, path in paths.items()}
  with contextlib.ExitStack() as undo:
    for path in partial.values():
      undo.callback(_remove, path)
    with contextlib.ExitStack() as closing:
      files = {part: closing.enter_context(contextlib.closing(writer(path))) for part, path in partial.items()}
      for block in _blocks(source, progress):
        parsed = _parse(source, block, done, writer.columns)
        start, done = done, done + len(parsed.table)
        if done > rows:
          break
        where = split(start, done)
        for part, file in files.items():
          file.write(parsed, where == part)
          clicks[part] += int(parsed.table[LABEL].to_numpy()[where == part].sum())
    if done != rows:
      raise DataError(f'{source} had {rows} rows and changed while it was read; start again when it is complete')
    # Old files go first: stopped between the two renames, one file is missing rather than of another split.
    for path in paths.values():
      _remove(path)
    for part, path in paths.items():
      os.replace(partial[part], path)
  return clicks


def _remove(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)


def _blocks(path: str, progress: Callable[[int], object]) -> Iterator[bytes]:
  """The file in pieces of whole lines; only the last piece may lack its line feed."""
  with open(path, 'rb') as file:
    rest, lines = b'', 0
    while data := file.read(BLOCK):
      progress(len(data))
      cut = data.rfind(b'\n') + 1
      if not cut and len(rest) + len(data) > BLOCK:
        raise DataError(f'{path}, line {lines + 1}: longer than {BLOCK} bytes; this is not the text file of {KAGGLE}')
      if cut:
        block = rest + data[:cut]
        lines += _line_feeds(block)
        yield block
        rest = b''
      rest += data[cut:]
    if rest:
      yield rest


def _line_feeds(text: bytes) -> int:
  # Several times as fast as bytes.count, which looks for one after the other.
  return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord('\n')))


def _parse(path: str, block: bytes, first: int, columns: tuple[str, ...]) -> Rows:
  """Checks lines, of which the first is row `first`, and reads some columns; raises `DataError` at a bad line."""
  text = block if block.endswith(b'\n') else block + b'\n'
  if b'\r' in text:
    text = text.replace(b'\r\n', b'\n')
  if not any(mark in text for mark in _FORBIDDEN) and _is_utf8(text) and not bad_rows.has_hexadecimal(text, b'\t'):
    # Other errors are of the file, and Arrow names neither line nor field.
    with contextlib.suppress(pa.ArrowInvalid):
      table = _read_columns(text, columns)
      label = table[LABEL]
      if len(table) == _line_feeds(text) and not label.null_count and np.isin(label.to_numpy(), (0, 1)).all():
        return Rows(text, table)
  lines = text.removesuffix(b'\n').split(b'\n')
  for i, line in enumerate(lines):
    cut = i == len(lines) - 1 and not block.endswith(b'\n')
    found = fault(line, first=first + i == 0, cut=cut)
    if found:
      raise DataError(f'{path}, line {first + i + 1}, {found}')
  raise DataError(f'{path}, lines {first + 1} to {first + len(lines)}: Arrow cannot read a field; write plain digits')


def _is_utf8(text: bytes) -> bool:
  if text.isascii():
    return True
  try:
    text.decode()
  except UnicodeDecodeError:
    return False
  return True


def _read_columns(text: bytes, columns: tuple[str, ...]) -> pa.Table:
  return arrow_csv.read_csv(
    pa.BufferReader(text),
    arrow_csv.ReadOptions(use_threads=False, block_size=1 << 18, column_names=COLUMNS),
    arrow_csv.ParseOptions(delimiter='\t', quote_char=False, ignore_empty_lines=False),
    arrow_csv.ConvertOptions(
      column_types=_TYPES, include_columns=columns, null_values=[''], strings_can_be_null=True, check_utf8=False
    ),
  )


def fault(line: bytes, first: bool = False, cut: bool = False) -> str | None:
  """What is wrong with a tab-separated line, and what to do; None for a good one.

  Args:
    line: its bytes without the line end.
    first: whether it is the first line of the file.
    cut: whether it is the last line of the file and no line feed follows.
  """
  fields = line.split(b'\t')
  if not line.strip():
    return 'field label: found a blank line; remove it'
  if len(fields) != len(COLUMNS):
    name = COLUMNS[min(len(fields), len(COLUMNS)) - 1]
    return f'field {name}: found {len(fields)} columns separated by tabs, expected {len(COLUMNS)}{_advice(line, cut)}'
  for name, field in zip(COLUMNS, fields, strict=True):
    if any(mark in field for mark in _FORBIDDEN[:3]):
      return f'field {name}: found {field[:40]!r}; a comma, quote or carriage return may not be in a field: remove it'
  found = bad_rows.fault(line.translate(_TO_COMMAS), first, cut)
  for name, field in zip(_NUMBERS, fields, strict=False):
    if not found and field and not re.fullmatch(rb'-?\d+', field):
      found = f'field {name}: found {field[:40]!r}, expected {"an integer" if name != LABEL else "0 or 1"}; correct it'
  return found


def _advice(line: bytes, cut: bool) -> str:
  columns = line.count(b'\t') + 1
  if columns == 1 and line.count(b',') == len(COLUMNS) - 1:
    return ', but 40 separated by commas: such a file needs no preparing, name it train.csv or eval.csv'
  if cut and columns < len(COLUMNS):
    return ': the file ends in the middle of a row; it was cut off: unpack it again, or remove its last line'
  if columns == len(COLUMNS) - 1:
    return "; without a label it may be Kaggle's test.txt: pass train.txt"
  return f': {LABEL}, I1 to I13, C1 to C26, as in train.txt, unpacked; correct or remove the line'


def main(arguments: list[str] | None = None) -> int:
  """The command: one line of JSON on stdout and 0, or one line on stderr and 1."""
  parser = argparse.ArgumentParser(prog='python -m dlrm_jax.data.prepare', description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--input', default='./data/train.txt', help='the tab-separated file (%(default)s)')
  add('--out', default='./data', help='folder of the two files that are written (%(default)s)')
  add('--format', default='csv', choices=WRITERS, help='train.csv and eval.csv, or .parquet (%(default)s)')
  add('--train_rows', default=8_000_000, type=_at_least(0), help='0: all but --eval_rows (%(default)s)')
  add('--eval_rows', default=2_000_000, type=_at_least(1), help='(%(default)s)')
  add('--split', default='time', choices=SPLITS, help='time: the first rows train, the last evaluate (%(default)s)')
  add('--seed', default=0, type=_at_least(0), help='of --split random (%(default)s)')
  add('--force', action='store_true', help='write over files that are there')
  args = parser.parse_args(arguments)
  try:
    result = prepare(
      args.input, args.out, args.format, args.train_rows, args.eval_rows, args.split, args.seed, args.force
    )
  except (DataError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(json.dumps(result))
  return 0


def _at_least(least: int) -> Callable[[str], int]:
  def number(text: str) -> int:
    value = int(text)
    if value < least:
      raise argparse.ArgumentTypeError(f'{value} is less than {least}')
    return value

  return number


if __name__ == '__main__':
  sys.exit(main())
