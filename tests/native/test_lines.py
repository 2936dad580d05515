"""Plain rows parsed in C++, beside Arrow's reader and what the rows mean."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data import csv as reader
from dlrm_jax.data.schema import DataError
from dlrm_jax.embeddings.hashing import fingerprint64
from dlrm_jax.native import build, lines

pytestmark = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
EMPTY = fingerprint64(b' ')
ROW = ['1', '5', '', '-3', *10 * ['0'], 'abcdefgh', '', *24 * ['1234567z']]


def parse(*rows, end=b'\n'):
  return lines.parse(b''.join(','.join(row).encode() + end for row in rows), len(rows), EMPTY)


def changed(column, value):
  return [*ROW[:column], value, *ROW[column + 1 :]]


def test_values():
  (label, integers, missing, hashes) = parse(ROW, changed(0, '0'))
  assert label.tolist() == [1, 0]
  assert integers[:, 1].tolist() == [5, 0, -3, *10 * [0]]
  assert missing.tolist() == [2, 2]
  assert hashes[:, 0].tolist() == [fingerprint64(b'abcdefgh'), EMPTY, *24 * [fingerprint64(b'1234567z')]]


@pytest.mark.parametrize('length', range(17))
def test_ids_of_any_length(length):
  ids = [bytes(33 + (7 * i + j) % 90 for i in range(length)).replace(b'"', b'!').replace(b',', b'.') for j in range(26)]
  for end in (b'\n', b'\r\n', b''):
    found = parse([*ROW[:14], *(id.decode() for id in ids)], end=end)
    assert found.hashes[:, 0].tolist() == [fingerprint64(id or b' ') for id in ids]


@pytest.mark.parametrize('text', ['0', '-0', '007', '-1', '9' * 18, '-' + '9' * 18, str(2**53 + 1), '16777217'])
def test_integers(text):
  found = parse(changed(2, text)).integers[1, 0]
  assert found == np.float32(np.float64(int(text)))
  assert not np.signbit(found) or int(text) < 0


@pytest.mark.parametrize(
  ('column', 'value'),
  [
    *((0, value) for value in ('', '2', '00', '1.0', ' 1', 'x', '-1')),
    *((13, value) for value in ('-', '+1', '1.', '1e3', ' 1', '1 ', 'x', '9' * 19, '--1', '1-')),
    *((14, value) for value in ('a"', '"a"', 'é', 'a\0', 'a\rb', 'q' * 17, 'a,b', 'a\nb')),
    *((39, value) for value in ('a"', 'a\r\r', 'a,', 'a\n', 'abcdefg,', 'abcdefgh\0')),
  ],
)
def test_what_is_not_plain_is_left_alone(column, value):
  assert parse(ROW, changed(column, value), ROW) is None


def test_other_numbers_of_fields_and_rows():
  assert parse(ROW[:-1]) is None
  assert parse([*ROW, '']) is None
  assert parse([]) is None
  data = (','.join(ROW) + '\n').encode()
  assert lines.parse(data, 1, EMPTY)
  assert lines.parse(2 * data, 1, EMPTY) is None
  assert lines.parse(data, 2, EMPTY) is None
  assert lines.parse(data + b'\n', 1, EMPTY) is None
  assert not len(lines.parse(b'', 0, EMPTY).label)


ODD = ['1.5', '+2', ' 3', '"4"', '9' * 20, 'ab cd', 'é', 'x\r']
FIELDS = st.sampled_from(['', '0', '1', '-7', '12345678', '0012', *ODD])
IDS = st.one_of(FIELDS, st.text('0123456789abcdef', max_size=18), st.text(max_size=9))


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(['\n', '\r\n']))
def test_files_mean_the_same_with_and_without(tmp_path_factory, data, end):
  rows = [list(ROW) for _ in range(4)]
  for _ in range(data.draw(st.integers(0, 6))):
    column = data.draw(st.integers(0, 39))
    rows[data.draw(st.integers(0, 3))][column] = data.draw(IDS if column > 13 else FIELDS)
  path = tmp_path_factory.mktemp('lines') / 'a.csv'
  path.write_bytes(end.join(','.join(row) for row in rows).encode() + end.encode())
  try:
    file = reader.index_csv(str(path), 'skip')
  except DataError:
    return  # no row is good
  found, expected = (dataclasses.replace(file, native=native).read(0, file.rows, 'skip') for native in (True, False))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize('native', [True, False])
def test_a_carriage_return_too_many_is_a_bad_row(tmp_path, native):
  row = ','.join(ROW)
  path = tmp_path / 'a.csv'
  path.write_bytes(f'{row}\r\n{row}x\r\r\n{row}\r\n'.encode())
  file = dataclasses.replace(reader.index_csv(str(path), 'skip'), native=native)
  assert file.read(0, 3, 'skip').good.tolist() == [True, False, True]
  with pytest.raises(DataError, match='line 2, field C26: found a carriage return before the end'):
    file.read(0, 3, 'error')
