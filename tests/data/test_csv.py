"""CSV files against Python's csv module, and what is said about bad ones."""

import csv
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data import csv as reader
from dlrm_jax.data.encode import BUCKET, DENSE, WEIGHT
from dlrm_jax.data.index import index_files
from dlrm_jax.data.schema import DataError


def read(path, spec, start=0, stop=None):
  """Label, dense, bucket and weight of a file's rows."""
  index = index_files(str(path), '', spec.on_bad_row)
  rows = index.read(start, index.rows if stop is None else stop, spec)
  floats = rows.view(np.float32)
  return floats[:, 0], floats[:, DENSE], rows[:, BUCKET], floats[:, WEIGHT]


def assert_reads_as(found, expected):
  """Labels and buckets exactly, floats to single precision."""
  label, dense, bucket, weight = found
  np.testing.assert_array_equal(label, expected[0])
  np.testing.assert_allclose(dense, expected[1], rtol=3e-7)
  np.testing.assert_array_equal(bucket, expected[2])
  assert (weight == 1).all()


@pytest.mark.parametrize('transform', ['log', 'minmax', 'none'])
def test_rows(criteo, tmp_path, transform):
  rows = criteo.rows(300)
  criteo.write(tmp_path / 'a.csv', rows)
  found = read(tmp_path / 'a.csv', criteo.spec('', dense_transform=transform))
  assert_reads_as(found, criteo.expected(rows, transform))


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('final', [True, False])
@pytest.mark.parametrize('blank', ['', '\n', '\n\r\n \n'])
@pytest.mark.parametrize('block', [3, reader.BLOCK])
def test_line_ends(criteo, tmp_path, monkeypatch, end, final, blank, block):
  monkeypatch.setattr(reader, 'BLOCK', block)
  rows = criteo.rows(20)
  path = criteo.write(tmp_path / 'a.csv', rows, end, final)
  with open(path, 'a', newline='') as file:
    file.write(blank)
  assert_reads_as(read(path, criteo.spec('')), criteo.expected(rows))


@pytest.mark.parametrize('quoting', [csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_quotes(criteo, tmp_path, quoting):
  rows = criteo.rows(50)
  rows[7][20] = 'a "quoted", id'
  text = io.StringIO(newline='')
  csv.writer(text, quoting=quoting).writerows(rows)
  (tmp_path / 'a.csv').write_bytes(text.getvalue().encode())
  assert_reads_as(read(tmp_path / 'a.csv', criteo.spec('')), criteo.expected(rows))


def test_byte_order_mark_and_strings_of_any_kind(criteo, tmp_path):
  rows = criteo.rows(20)
  rows[3][14:18] = ['é', 'NULL', 'nan', 'x' * 100]
  (tmp_path / 'a.csv').write_bytes(b'\xef\xbb\xbf' + '\n'.join(','.join(row) for row in rows).encode())
  assert_reads_as(read(tmp_path / 'a.csv', criteo.spec('')), criteo.expected(rows))


@pytest.mark.parametrize('form', ['{}.0', '{:.1e}', '{}.'])
def test_integers_written_as_floats(criteo, tmp_path, form):
  """As pandas writes a column of integers that has missing values."""
  rows = criteo.rows(50)
  for row in rows:
    row[1:14] = [x and form.format(int(x)) for x in row[1:14]]
  criteo.write(tmp_path / 'a.csv', rows)
  assert_reads_as(read(tmp_path / 'a.csv', criteo.spec('')), criteo.expected(rows))


def test_integers_at_the_ends_of_64_bits(criteo, tmp_path):
  rows = criteo.rows(4)
  rows[1][5], rows[2][5] = str(2**63 - 1), str(-(2**63))
  criteo.write(tmp_path / 'a.csv', rows)
  assert_reads_as(read(tmp_path / 'a.csv', criteo.spec('')), criteo.expected(rows))


@pytest.mark.parametrize('block', [1, 7, 100, 5000])
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_range_of_rows_from_any_blocks(criteo, tmp_path_factory, block, data):
  rows = criteo.rows(40)
  path = criteo.write(tmp_path_factory.mktemp('blocks') / 'a.csv', rows, final=data.draw(st.booleans()))
  start = data.draw(st.integers(0, 39))
  stop = data.draw(st.integers(start + 1, 40))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reader, 'BLOCK', block)
    found = read(path, criteo.spec(''), start, stop)
  assert_reads_as(found, criteo.expected(rows[start:stop]))


def test_range_over_several_files(criteo, tmp_path):
  rows = criteo.rows(60)
  for name, part in [('p0.csv', rows[:1]), ('p1.csv', rows[1:31]), ('q.csv', rows[31:])]:
    criteo.write(tmp_path / name, part)
  index = index_files('q.csv, p*.csv', str(tmp_path))
  assert index.rows == 60
  found = index.read(0, 45, criteo.spec('')).view(np.float32)
  np.testing.assert_array_equal(found[:, 0], criteo.expected(rows[:45])[0])


# What to do to row 150 of 300, the field and the words of the message.
FAULTS = {
  'label 2': (lambda row: ['2', *row[1:]], 'label', "found '2', expected 0 or 1"),
  'label missing': (lambda row: ['', *row[1:]], 'label', "found '', expected 0 or 1"),
  'label word': (lambda row: ['yes', *row[1:]], 'label', "found 'yes', expected 0 or 1"),
  'word': (lambda row: [*row[:5], 'abc', *row[6:]], 'I5', "found 'abc', which is no number"),
  'nan': (lambda row: [*row[:5], 'nan', *row[6:]], 'I5', "found 'nan', which is no number"),
  'blank field': (lambda row: [*row[:5], ' ', *row[6:]], 'I5', "found ' ', which is no number"),
  'hexadecimal': (lambda row: [*row[:5], '0x10', *row[6:]], 'I5', "found '0x10', which is no number"),
  'hexadecimal label': (lambda row: ['0X1', *row[1:]], 'label', "found '0X1', expected 0 or 1"),
  'other digits': (lambda row: [*row[:5], '٣', *row[6:]], 'I5', "found '٣', which is no number"),
  'other blank': (lambda row: [*row[:5], '\xa05', *row[6:]], 'I5', r"found '\\xa05', which is no number"),
  'carriage return': (lambda row: [*row[:39], 'a\rb'], 'C26', 'carriage return inside the line'),
  'too large': (lambda row: [*row[:13], str(2**63), *row[14:]], 'I13', 'does not fit 64 bits'),
  'too small': (lambda row: [*row[:1], str(-(2**63) - 1), *row[2:]], 'I1', 'does not fit 64 bits'),
  'infinite': (lambda row: [*row[:1], '1e400', *row[2:]], 'I1', 'does not fit 64 bits'),
  'short': (lambda row: row[:39], 'C25', 'found 39 columns, expected 40'),
  'long': (lambda row: [*row, 'x'], 'C26', 'found 41 columns, expected 40'),
  'blank': (lambda row: [], 'label', 'blank line'),
  'tabs': (lambda row: ['\t'.join(row)], 'label', 'found 39 tabs.*dlrm_jax.data.prepare'),
  'quote': (lambda row: [*row[:39], '"abc'], 'C26', 'quote that does not close'),
  'NUL': (lambda row: [*row[:39], 'ab\0c'], 'C26', 'NUL byte'),
}


@pytest.mark.parametrize(
  ('fault', 'at'),
  [(fault, at) for fault in FAULTS for at in (150, 299) if (fault, at) != ('blank', 299)],  # at the end it is none
)
def test_bad_row(criteo, tmp_path, fault, at):
  """The message names file, line and field, wherever the row stands."""
  change, field, words = FAULTS[fault]
  rows = criteo.rows(300)
  rows[at] = change(rows[at])
  path = criteo.write(tmp_path / 'a.csv', rows)
  with pytest.raises(DataError, match=rf'a\.csv, line {at + 1}, field {field}: .*{words}'):
    read(path, criteo.spec(''))
  index = index_files(path, '', 'skip')
  with pytest.raises(DataError, match=rf'a\.csv, line {at + 1}, field {field}: '):
    index.read(100, 300, criteo.spec(''))


@pytest.mark.parametrize('fault', FAULTS)
def test_skipped_row(criteo, tmp_path, fault, caplog):
  rows = criteo.rows(300)
  bad = [150, 151, 203]
  for at in bad:
    rows[at] = FAULTS[fault][0](rows[at])
  path = criteo.write(tmp_path / 'a.csv', rows)
  found = read(path, criteo.spec('', on_bad_row='skip'))
  good = np.delete(np.arange(300), bad)
  assert_reads_as([part[good] for part in found], criteo.expected([rows[i] for i in good]))
  assert not any(part[bad].any() for part in found)
  assert re.search(r'skipped: .*a\.csv, line 151, field', caplog.text)


def test_invalid_utf8(criteo, tmp_path):
  rows = criteo.rows(200)
  rows[170][39] = 'here'
  path = criteo.write(tmp_path / 'a.csv', rows)
  data = (tmp_path / 'a.csv').read_bytes().replace(b'here', b'ab\xff\xfe')
  (tmp_path / 'a.csv').write_bytes(data)
  with pytest.raises(DataError, match=r'a\.csv, line 171, field C26: found bytes that are not UTF-8'):
    read(path, criteo.spec(''))


@pytest.mark.parametrize('on_bad_row', ['error', 'skip'])
@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda rows: [['label', *(f'I{i}' for i in range(1, 14)), *(f'C{i}' for i in range(1, 27))]], 'header line'),
    (lambda rows: [['\t'.join(row)] for row in rows], 'found 39 tabs.*dlrm_jax.data.prepare'),
    (lambda rows: [row[1:] for row in rows], 'found 39 columns'),
    (lambda rows: [['\0\0\0']], 'NUL'),
  ],
  ids=['header only', 'tabs', 'no label', 'binary'],
)
def test_file_of_another_format_is_refused_at_once(criteo, tmp_path, change, words, on_bad_row):
  path = criteo.write(tmp_path / 'a.csv', change(criteo.rows(30)))
  with pytest.raises(DataError, match=rf'a\.csv, line 1, field .*{words}'):
    index_files(path, '', on_bad_row)


def test_header_before_good_rows(criteo, tmp_path):
  header = ['clicked', *(f'I{i}' for i in range(1, 14)), *(f'C{i}' for i in range(1, 27))]
  path = criteo.write(tmp_path / 'a.csv', [header, *criteo.rows(30)])
  with pytest.raises(DataError, match=r'a\.csv, line 1, field label: found a header line \(clicked, I1, ...\); remove'):
    index_files(path, '')
  assert read(path, criteo.spec('', on_bad_row='skip'))[3].tolist() == [0] + 30 * [1]


def test_truncated_last_line_is_seen_before_training(criteo, tmp_path):
  path = criteo.write(tmp_path / 'a.csv', criteo.rows(500))
  data = (tmp_path / 'a.csv').read_bytes()
  (tmp_path / 'a.csv').write_bytes(data[: data.rstrip().rindex(b',', 0, -60)])
  with pytest.raises(DataError, match=r'a\.csv, line 500, field C\d+: the file ends in the middle of a row'):
    index_files(path, '')
  assert read(path, criteo.spec('', on_bad_row='skip'))[3].tolist() == 499 * [1] + [0]


@pytest.mark.parametrize('content', [b'', b'\n', b'\r\n \n\n'])
def test_empty_file(tmp_path, content):
  (tmp_path / 'a.csv').write_bytes(content)
  with pytest.raises(DataError, match=r'a\.csv is empty'):
    index_files('a.csv', str(tmp_path))


def test_missing_folder_and_files(criteo, tmp_path):
  with pytest.raises(DataError, match=r"data_location '.*nowhere' is not a folder; .*dlrm_jax.data.prepare"):
    index_files('train.csv', str(tmp_path / 'nowhere'))
  with pytest.raises(DataError, match=r"no file 'train.csv' in .*; there is nothing\. Set data.train"):
    index_files('train.csv', str(tmp_path))
  (tmp_path / 'train.parquet').touch()
  with pytest.raises(
    DataError, match=r"no file 'train.csv' in .*; there is train.parquet\. .*data.train=train.parquet"
  ):
    index_files('train.csv', str(tmp_path))
  (tmp_path / 'train.txt').touch()
  with pytest.raises(DataError, match=r'there is train.parquet, train.txt\. .*python -m dlrm_jax.data.prepare'):
    index_files('train.csv', str(tmp_path))
  criteo.write(tmp_path / 'train.csv', criteo.rows(3))
  with pytest.raises(DataError, match=r"no file 'part-\*'"):
    index_files('train.csv,part-*', str(tmp_path))


def test_line_numbers_in_big_and_several_files(criteo, tmp_path):
  rows = criteo.rows(3000)
  criteo.write(tmp_path / 'a.csv', rows)
  rows[2900][3] = 'x'
  criteo.write(tmp_path / 'b.csv', rows)
  index = index_files('*.csv', str(tmp_path))
  with pytest.raises(DataError, match=r'b\.csv, line 2901, field I3: '):
    index.read(5000, 6000, criteo.spec(''))


@pytest.mark.parametrize('on_bad_row', ['error', 'skip'])
@pytest.mark.parametrize('native', [True, False])
def test_file_that_was_changed(criteo, tmp_path, native, on_bad_row):
  file, line = tmp_path / 'a.csv', ','.join(['1', *13 * ['5'], *26 * ['a']]) + '\n'
  index = index_files(criteo.write(file, criteo.rows(300)), '', on_bad_row, native)
  size = file.stat().st_size
  for text in (300 * line, size // len(line) * line + size % len(line) * ' '):  # a smaller one, and one as large
    file.write_text(text)
    for start, stop in [(0, 100), (0, 300), (50, 60), (299, 300)]:
      with pytest.raises(DataError, match=r'a\.csv was changed since its lines were counted; start again'):
        index.read(start, stop, criteo.spec('', on_bad_row=on_bad_row))


def test_file_that_grew_is_read_as_it_was(criteo, tmp_path):
  rows = criteo.rows(60)
  path = criteo.write(tmp_path / 'a.csv', rows[:30])
  index = index_files(path, '')
  criteo.write(tmp_path / 'a.csv', rows)
  found = index.read(10, 30, criteo.spec('')).view(np.float32)
  np.testing.assert_array_equal(found[:, 0], criteo.expected(rows[10:30])[0])


def test_rows_that_only_python_would_refuse(criteo, tmp_path):
  """They are good beside bad ones, too."""
  rows = criteo.rows(20)
  plain = [list(row) for row in rows]
  rows[3][20], plain[3][20] = '"ab"c', 'abc'
  rows[4][21] = plain[4][21] = 'x' * 200_000
  rows[19][0] = 'bad'
  found = read(criteo.write(tmp_path / 'a.csv', rows), criteo.spec('', on_bad_row='skip'))
  assert_reads_as([part[:19] for part in found], criteo.expected(plain[:19]))


FIELDS = st.sampled_from(
  [
    '',
    '0',
    '1',
    '-5',
    '+5',
    '1.5',
    '.5',
    '5.',
    '1e3',
    ' 7',
    '7 ',
    'inf',
    '-nan',
    'a',
    '"3"',
    '007',
    '-',
    '1_000',
    'a"b',
    ' ',
    '\t',
    '0x1',
    '-0x1',
    ' 0X1',
    '٣',
    '\xa05',
    '\x0b5',
    '"a"b',
  ]
)


@given(values=st.lists(st.tuples(st.integers(0, 13), FIELDS), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_what_arrow_refuses_has_a_name_and_nothing_else(criteo, tmp_path_factory, values):
  """A row alone, and the same row beside one that forces the slow way, are judged alike."""
  rows = criteo.rows(3)
  for column, value in values:
    rows[1][column] = value
  spec = criteo.spec('', on_bad_row='skip')
  folder = tmp_path_factory.mktemp('same')
  alone = read(criteo.write(folder / 'a.csv', rows), spec)
  rows[2][0] = 'bad'
  beside = read(criteo.write(folder / 'b.csv', rows), spec)
  rows[2][:3] = '1', '1.5', '1'
  fraction = read(criteo.write(folder / 'c.csv', rows), spec)
  for one, two, three in zip(alone, beside, fraction, strict=True):
    np.testing.assert_array_equal(one[:2], two[:2])
    np.testing.assert_array_equal(one[:2], three[:2])
