"""Parquet files against the same rows as CSV, and what is said about bad ones."""

import random
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_jax.data.encode import WEIGHT
from dlrm_jax.data.index import index_files
from dlrm_jax.data.pipeline import batches_per_epoch, eval_batches, train_batches
from dlrm_jax.data.schema import CATEGORIES, COLUMNS, INTEGERS, DataError


def table(rows, integers=None, strings=None, names=COLUMNS):
  """Rows of strings as a table with columns of the given types; an empty field is null."""
  columns = []
  for name, values in zip(COLUMNS, zip(*rows, strict=True), strict=True):
    if name in CATEGORIES:
      columns.append(pa.array([v or None for v in values], pa.string()).cast(strings or pa.string()))
    else:
      columns.append(pa.array([int(v) if v else None for v in values], pa.int64()).cast(integers or pa.int64()))
  return pa.table(columns, names=list(names))


@pytest.fixture
def rows(criteo):
  return criteo.rows(400)


def read(path, spec, start=0, stop=None):
  """Packed rows of a file."""
  index = index_files(str(path), '')
  return index.read(start, index.rows if stop is None else stop, spec)


@pytest.fixture
def as_csv(criteo, rows, tmp_path):
  """The rows read from CSV: what every form of Parquet must give."""
  return read(criteo.write(tmp_path / 'oracle.csv', rows), criteo.spec(''))


STRINGS = [
  pa.string(),
  pa.large_string(),
  pa.binary(),
  pa.large_binary(),
  pa.dictionary(pa.int32(), pa.string()),
  pa.string_view(),
]


@pytest.mark.parametrize('strings', STRINGS, ids=str)
@pytest.mark.parametrize('group', [1, 37, 1000])
def test_types_of_categories_and_row_groups(criteo, rows, as_csv, tmp_path, strings, group):
  pq.write_table(table(rows, strings=strings), tmp_path / 'a.parquet', row_group_size=group)
  np.testing.assert_array_equal(read(tmp_path / 'a.parquet', criteo.spec('')), as_csv)


@pytest.mark.parametrize('integers', [pa.int64(), pa.float64(), pa.decimal128(30)], ids=str)
def test_types_of_integers(criteo, rows, as_csv, tmp_path, integers):
  pq.write_table(table(rows, integers), tmp_path / 'a.parquet')
  np.testing.assert_array_equal(read(tmp_path / 'a.parquet', criteo.spec('')), as_csv)


@pytest.mark.parametrize(
  'integers', [pa.int8(), pa.uint8(), pa.uint16(), pa.int32(), pa.uint64(), pa.float32()], ids=str
)
def test_small_types_of_integers(criteo, tmp_path, integers):
  rows = [[x and str(min(abs(int(x)), 100)) for x in row[:14]] + row[14:] for row in criteo.rows(100)]
  pq.write_table(table(rows, integers), tmp_path / 'a.parquet')
  expected = read(criteo.write(tmp_path / 'a.csv', rows), criteo.spec(''))
  np.testing.assert_array_equal(read(tmp_path / 'a.parquet', criteo.spec('')), expected)


def test_empty_strings_and_nan_are_missing(criteo, rows, as_csv, tmp_path):
  columns = table(rows, pa.float64()).to_pydict()
  for name in INTEGERS:
    columns[name] = [float('nan') if v is None else v for v in columns[name]]
  for name in CATEGORIES:
    columns[name] = [v or '' for v in columns[name]]
  pq.write_table(pa.table(columns), tmp_path / 'a.parquet')
  np.testing.assert_array_equal(read(tmp_path / 'a.parquet', criteo.spec('')), as_csv)


def test_boolean_labels_and_columns_of_nulls(criteo, tmp_path):
  rows = [[*row[:3], '', *row[4:20], '', *row[21:]] for row in criteo.rows(50)]
  columns = table(rows)
  columns = columns.set_column(0, 'label', columns['label'].cast(pa.bool_()))
  columns = columns.set_column(3, 'I3', pa.nulls(50)).set_column(20, 'C7', pa.nulls(50))
  pq.write_table(columns, tmp_path / 'a.parquet')
  expected = read(criteo.write(tmp_path / 'a.csv', rows), criteo.spec(''))
  np.testing.assert_array_equal(read(tmp_path / 'a.parquet', criteo.spec('')), expected)


def test_columns_by_name_in_any_order_and_among_others(criteo, rows, as_csv, tmp_path):
  columns = table(rows).append_column('day', pa.nulls(len(rows)))
  names = columns.column_names
  random.Random(0).shuffle(names)
  pq.write_table(columns.select(names), tmp_path / 'a.parquet')
  np.testing.assert_array_equal(read(tmp_path / 'a.parquet', criteo.spec('')), as_csv)


@pytest.mark.parametrize('names', [[f'_c{i}' for i in range(40)], ['clicked', *COLUMNS[1:]]])
def test_columns_by_position(criteo, rows, as_csv, tmp_path, names):
  pq.write_table(table(rows, names=names), tmp_path / 'a.parquet')
  np.testing.assert_array_equal(read(tmp_path / 'a.parquet', criteo.spec('')), as_csv)


def test_ranges_in_any_order_and_from_several_threads(criteo, rows, as_csv, tmp_path):
  pq.write_table(table(rows), tmp_path / 'a.parquet', row_group_size=90)
  index = index_files('a.parquet', str(tmp_path))
  rng = random.Random(1)
  ranges = [sorted(rng.sample(range(401), 2)) for _ in range(60)]
  found = {}

  def read_some(part):
    for start, stop in part:
      found[start, stop] = index.read(start, stop, criteo.spec(''))

  threads = [threading.Thread(target=read_some, args=(ranges[i::3],)) for i in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for start, stop in ranges:
    np.testing.assert_array_equal(found[start, stop], as_csv[start:stop])


def test_the_same_batches_as_from_csv(criteo, rows, tmp_path):
  """Also several files of both kinds in one epoch, twice."""
  criteo.write(tmp_path / 'a.csv', rows)
  criteo.write(tmp_path / 'part0.csv', rows[:70])
  pq.write_table(table(rows[70:300]), tmp_path / 'part1.parquet', row_group_size=64)
  pq.write_table(table(rows[300:]), tmp_path / 'part2.parquet')
  spec = criteo.spec('')
  indices = [index_files(pattern, str(tmp_path)) for pattern in ('a.csv', 'part*')]
  for make in (lambda index: train_batches(index, spec, 32, 3), lambda index: eval_batches(index, spec, 32)):
    one, two = map(make, indices)
    for _ in range(batches_per_epoch(400, 32)):
      (first, _), (second, _) = next(one), next(two)
      np.testing.assert_array_equal(first.bucket, second.bucket)
      np.testing.assert_array_equal(first.dense, second.dense)
      np.testing.assert_array_equal(first.label, second.label)
      np.testing.assert_array_equal(first.weight, second.weight)


@pytest.mark.parametrize(
  ('column', 'kind', 'value', 'words'),
  [
    ('label', pa.int64(), 2, 'found 2, expected 0 or 1'),
    ('label', pa.int64(), None, 'found None, expected 0 or 1'),
    ('label', pa.float64(), float('nan'), 'found nan, expected 0 or 1'),
    ('I4', pa.uint64(), 2**63, 'found 9223372036854775808, which does not fit 64 bits'),
    ('I4', pa.float64(), float('inf'), 'found inf, which does not fit 64 bits'),
    ('I4', pa.float64(), -1e30, r'found -1e\+30, which does not fit 64 bits'),
    ('I4', pa.float64(), 1e300, r'found 1e\+300, which does not fit 64 bits'),
  ],
)
def test_bad_row(criteo, rows, as_csv, tmp_path, column, kind, value, words):
  columns = table(rows)
  values = [abs(v) if v else v for v in columns[column].to_pylist()]
  values[250] = value
  columns = columns.set_column(COLUMNS.index(column), column, pa.array(values, kind, from_pandas=False))
  pq.write_table(columns, tmp_path / 'a.parquet')
  with pytest.raises(DataError, match=rf'a\.parquet, row 251, field {column}: {words}'):
    read(tmp_path / 'a.parquet', criteo.spec(''))
  rows = read(tmp_path / 'a.parquet', criteo.spec('', on_bad_row='skip'))
  assert np.flatnonzero(rows[:, WEIGHT] == 0).tolist() == [250]
  assert not rows[250].any()
  good = np.delete(np.arange(400), 250)
  kept = [i for i in range(41) if i != COLUMNS.index(column)]
  np.testing.assert_array_equal(rows[good][:, kept], as_csv[good][:, kept])


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda t: t.drop_columns(['C26']), r'field C26: 1 of the columns .* missing \(C26\); found 39 columns'),
    (lambda t: t.drop_columns(['label', 'I1']), r'field label: 2 of the columns .* \(label, I1\)'),
    (lambda t: t.select([*COLUMNS[1:], 'label']).rename_columns([*COLUMNS[1:], 'y']), r'field label: 1 of'),
    (lambda t: t.set_column(3, 'I3', t['C1']), "field I3: column 'I3' has type string, expected integers"),
    (lambda t: t.set_column(0, 'label', t['C1']), "field label: column 'label' has type string, expected integers 0"),
    (lambda t: t.set_column(14, 'C1', t['I2']), "field C1: column 'C1' has type int64, expected strings"),
    (lambda t: t.slice(0, 0), 'is empty'),
  ],
)
def test_bad_schema(rows, tmp_path, change, words):
  pq.write_table(change(table(rows)), tmp_path / 'a.parquet')
  with pytest.raises(DataError, match=rf'a\.parquet.*{words}'):
    index_files('a.parquet', str(tmp_path))


@pytest.mark.parametrize('damage', [lambda data: data[: len(data) // 2], lambda data: data[:4] + bytes(len(data) - 4)])
def test_a_file_that_was_damaged_or_changed(criteo, rows, tmp_path, damage):
  path = tmp_path / 'a.parquet'
  pq.write_table(table(rows), path)
  index = index_files('a.parquet', str(tmp_path))
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(DataError, match=r'a\.parquet cannot be read, it is damaged or was changed \(.*\); write'):
    index.read(0, 400, criteo.spec(''))


@pytest.mark.parametrize('content', [b'', b'0,1,2\n', b'PAR1 but cut off'])
def test_no_parquet_file(tmp_path, content):
  (tmp_path / 'a.parquet').write_bytes(content)
  with pytest.raises(DataError, match=r'a\.parquet cannot be read as Parquet'):
    index_files('a.parquet', str(tmp_path))
