"""What is wrong with a line of CSV, in words: only for the few lines that Arrow's reader refuses."""

import csv
import re
import sys

from dlrm_jax.data.schema import COLUMNS, INTEGERS, LABEL

_NUMBER = re.compile(r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?')
_INTEGER = re.compile(r'-?[0-9]+')
_BLANKS = ' \t'  # that Arrow's reader leaves out around a number

# A label or integer that begins as hexadecimal numbers do: Arrow's reader takes them, in whole numbers alone.
_HEXADECIMAL = {
  delimiter: re.compile(
    rb'^(?:[^%b\n]*%b){0,%d}[%b"+-]*0[xX]' % (delimiter, delimiter, len(INTEGERS), blanks), re.MULTILINE
  )
  for delimiter, blanks in ((b',', b' \t'), (b'\t', b' '))
}

csv.field_size_limit(sys.maxsize)  # Arrow has none

_EXPECTED = f'expected {len(COLUMNS)} columns separated by commas: {LABEL}, I1 to I13, C1 to C26'


def fault(line: bytes, first: bool = False, cut: bool = False) -> str | None:
  """Field, what was found and what to do; None for a good row.

  Args:
    line: the bytes of a line without its line feed.
    first: whether it is the first line of its file.
    cut: whether it is the last line of its file and no line feed follows.
  """
  line = line.removesuffix(b'\r')
  if first:
    line = line.removeprefix(b'\xef\xbb\xbf')
  found = _bad_bytes(line)
  if found:
    return found
  text = line.decode()
  if not text.strip():
    return 'field label: found a blank line; remove it'
  if '\t' in text and text.count(',') < text.count('\t'):
    return (
      f'field label: found {text.count(chr(9))} tabs, {_EXPECTED}; '
      'python -m dlrm_jax.data.prepare makes such a file from the tab-separated train.txt'
    )
  last = COLUMNS[min(text.count(','), len(COLUMNS) - 1)]
  if text.endswith('\r'):
    return f'field {last}: found a carriage return before the end of the line; remove it'
  try:
    fields = next(csv.reader([text], strict=True))
  except csv.Error as error:
    if '\r' in text:
      return f'field {last}: found a carriage return inside the line; a line ends with a line feed'
    if not text.count('"') % 2:
      fields = next(csv.reader([text]))  # something follows a closing quote, which Arrow's reader takes, too
    else:
      return f'field {last}: found a quote that does not close on this line ({error})'
  return _bad_fields(fields, first, cut)


def has_hexadecimal(data: bytes, delimiter: bytes = b',') -> bool:
  """Whether a number of some lines is hexadecimal, which `fault` does not allow."""
  return (b'0x' in data or b'0X' in data) and _HEXADECIMAL[delimiter].search(data) is not None


def _bad_bytes(line: bytes) -> str | None:
  for i, field in enumerate(line.split(b',')):
    name = COLUMNS[min(i, len(COLUMNS) - 1)]
    if b'\0' in field:
      return f'field {name}: found a NUL byte in {field[:40]!r}; the file is damaged or not CSV: write it again'
    try:
      field.decode()
    except UnicodeDecodeError as error:
      return (
        f'field {name}: found bytes that are not UTF-8 in {field[:40]!r} ({error.reason}); convert the file to UTF-8'
      )
  return None


def _bad_fields(fields: list[str], first: bool, cut: bool) -> str | None:
  if len(fields) != len(COLUMNS):
    name = COLUMNS[min(len(fields), len(COLUMNS)) - 1]
    if cut and len(fields) < len(COLUMNS):
      return (
        f'field {name}: the file ends in the middle of a row ({len(fields)} of {len(COLUMNS)} columns); '
        'it was cut off: copy it again or remove its last line'
      )
    return f'field {name}: found {len(fields)} columns, {_EXPECTED}'
  label, *numbers = (field.strip(_BLANKS) for field in fields[: 1 + len(INTEGERS)])
  if first and all(field and not _NUMBER.fullmatch(field) for field in (label, *numbers)):
    return f'field label: found a header line ({label}, {numbers[0]}, ...); remove it: the file must not have one'
  if not _NUMBER.fullmatch(label) or float(label) not in (0, 1):
    return f'field label: found {fields[0][:40]!r}, expected 0 or 1; correct or remove the row'
  for name, field, number in zip(INTEGERS, fields[1:], numbers, strict=False):
    problem = _bad_integer(number) if field else None
    if problem:
      return f'field {name}: found {field[:40]!r}, {problem}; correct or remove the row'
  return None


def _bad_integer(field: str) -> str | None:
  if not _NUMBER.fullmatch(field):
    return 'which is no number; expected an integer or nothing'
  if _INTEGER.fullmatch(field):
    return None if -(2**63) <= int(field) < 2**63 else 'which does not fit 64 bits'
  return None if abs(float(field)) < 2.0**63 else 'which does not fit 64 bits'
