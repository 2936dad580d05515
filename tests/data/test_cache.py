"""Batches from the cache against batches from the files, bit for bit; and caches that must not be used."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax import locks, sources
from dlrm_jax.data import cache, pipeline
from dlrm_jax.data.cache import index_cached
from dlrm_jax.data.index import index_files
from dlrm_jax.data.pipeline import batches_per_epoch, eval_batches, train_batches
from dlrm_jax.data.schema import CATEGORIES, COLUMNS, DataError
from tests.helpers import small_spec


@pytest.fixture(autouse=True)
def several_record_batches(monkeypatch):
  monkeypatch.setattr(cache, 'ROWS', 64)


@pytest.fixture
def place(tmp_path):
  """Where the cache of a.csv belongs."""
  return tmp_path / cache.FOLDER / 'a.csv.arrow'


def cached(path, spec):
  """The index of a file or files through their caches."""
  return index_cached(str(path), spec, str(path) + '.elsewhere')


def packed(index, spec):
  return index.read(0, index.rows, spec)


def assert_reads_like_the_file(path, spec):
  np.testing.assert_array_equal(
    packed(cached(path, spec), spec), packed(index_files(str(path), '', spec.on_bad_row), spec)
  )


def take(iterator, count):
  """So many batches and states, and the bad rows counted."""
  return [next(iterator) for _ in range(count)], iterator.skipped_rows


def assert_same(one, two):
  for (first, state), (second, other) in zip(one[0], two[0], strict=True):
    assert state == other
    for name in ('label', 'dense', 'bucket', 'weight'):
      a, b = getattr(first, name), getattr(second, name)
      assert (a.dtype, a.shape) == (b.dtype, b.shape)
      assert a.tobytes() == b.tobytes(), name
  assert one[1] == two[1]


@pytest.fixture
def mixed(criteo, tmp_path):
  """Two CSV files and a Parquet file, 400 rows, four of them bad; and fractions among the integers."""
  rows = criteo.rows(400)
  rows[20][2] = '1.5'
  rows[33][1] = rows[34][1] = str(2**53 + 2**29 + 1)  # rounds to another float by way of a double
  for number in (0, 7, 150, 399):
    rows[number][0] = '2'
  criteo.write(tmp_path / 'part0.csv', rows[:130])
  criteo.write(tmp_path / 'part2.csv', rows[300:])
  columns = list(zip(*rows[130:300], strict=True))
  kinds = [pa.string() if name in CATEGORIES else pa.int64() for name in COLUMNS]
  table = pa.table(
    [
      pa.array([v or None if kind == pa.string() else int(v) if v else None for v in values], kind)
      for values, kind in zip(columns, kinds, strict=True)
    ],
    names=list(COLUMNS),
  )
  pq.write_table(table, tmp_path / 'part1.parquet', row_group_size=50)
  return tmp_path


@pytest.mark.parametrize(('shuffle_rows', 'transform', 'threads'), [(13, 'log', 0), (0, 'minmax', 1), (40, 'none', 2)])
@pytest.mark.parametrize('processes', [1, 3])
def test_the_same_batches_as_from_the_files(criteo, mixed, shuffle_rows, transform, threads, processes):
  settings = {'dense_transform': transform, 'threads': threads, 'on_bad_row': 'skip'}
  spec = criteo.spec(mixed, shuffle_rows=shuffle_rows, **settings)
  direct = index_files('part*', str(mixed), 'skip')
  through = index_cached('part*', spec, '')
  assert through.rows == direct.rows == 400
  total = 0
  for i in range(processes):
    one, two = (take(train_batches(index, spec, 23, 3, i, processes), 40) for index in (direct, through))
    assert_same(one, two)
    one, two = (take(eval_batches(index, spec, 23, i, processes), 18) for index in (direct, through))
    assert_same(one, two)
    total += two[1]
  assert total == 4


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_resume_with_the_cache_switched_on_or_off(criteo, tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('resume')
  path, spec = criteo.write(folder / 'a.csv', criteo.rows(150)), criteo.spec('', shuffle_rows=12)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cache, 'ROWS', data.draw(st.integers(20, 200)))
    indices = [index_files(path, ''), cached(path, spec)]
  size = data.draw(st.integers(15, 60))
  count = 2 * batches_per_epoch(150, size)
  whole = take(train_batches(indices[0], spec, size, 3), count)[0]
  at, state, parts = 0, None, []
  while at < count:
    step = data.draw(st.integers(1, 10))
    index = indices[data.draw(st.integers(0, 1))]
    parts += take(train_batches(index, spec, size, 3, state=state), min(step, count - at))[0]
    at, state = len(parts), parts[-1][1]
  assert_same((whole, 0), (parts, 0))


def test_a_second_start_parses_nothing(criteo, tmp_path, place, monkeypatch, caplog):
  path, spec = criteo.write(tmp_path / 'a.csv', criteo.rows(200)), criteo.spec('')
  expected = packed(index_files(path, ''), spec)
  caplog.set_level(logging.INFO)
  cached(path, spec)
  assert f'writing 200 rows (0 MB) to {place}' in caplog.text
  before = os.stat(place)
  caplog.clear()
  monkeypatch.setattr(cache, 'index_file', None)
  np.testing.assert_array_equal(packed(cached(path, spec), spec), expected)
  assert [record.message for record in caplog.records] == [f'cache: 200 rows from {place}']
  assert os.stat(place) == before


def test_one_cache_serves_every_transform_and_number_of_buckets(criteo, tmp_path, place):
  path = criteo.write(tmp_path / 'a.csv', criteo.rows(200))
  cached(path, criteo.spec(''))
  before = os.stat(place).st_ino
  for change in ({'dense_transform': 'minmax'}, {'dense_transform': 'none'}, {'buckets': (2**31 - 1, *[3] * 25)}):
    assert_reads_like_the_file(path, criteo.spec('', **change))
  assert os.stat(place).st_ino == before


def test_the_whole_fingerprints_are_there(criteo, tmp_path):
  path, spec = criteo.write(tmp_path / 'a.csv', criteo.rows(70)), criteo.spec('')
  index = cached(path, spec)
  strings = [row[14:] for row in criteo.read(path)]
  found = np.concatenate([np.stack(batch.columns.hashes, 1) for batch in index.files])
  assert found.tolist() == [[criteo.fingerprint(string) for string in row] for row in strings]


def rewrite_same_size(path, rows, criteo):
  """Another row of the same length, and the old time."""
  before = os.stat(path)
  rows[1][-1] = 'f' * len(rows[1][-1])
  criteo.write(path, rows)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert os.stat(path).st_size == before.st_size


CHANGES = {
  'another time': lambda path, rows, criteo: os.utime(path, ns=(1, 1)),
  'a row more': lambda path, rows, criteo: criteo.write(path, [*rows, rows[0]]),
  'same size and time': rewrite_same_size,
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_file_is_cached_again(criteo, tmp_path, place, change, caplog):
  rows, spec = criteo.rows(100), criteo.spec('')
  rows[1][-1] = '0123abcd'
  path = tmp_path / 'a.csv'
  criteo.write(path, rows)
  cached(path, spec)
  CHANGES[change](path, rows, criteo)
  caplog.set_level(logging.INFO)
  assert_reads_like_the_file(path, spec)
  assert f'cache: {place} was made from' in caplog.text
  caplog.clear()
  assert_reads_like_the_file(path, spec)
  assert 'was made from' not in caplog.text


def test_a_large_file_is_sampled_from_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, 'SAMPLES', 5)
  monkeypatch.setattr(cache, 'SAMPLE_BYTES', 10)
  data, path = bytearray(range(200)), tmp_path / 'a'
  seen = []
  for at in range(200):
    changed = data.copy()
    changed[at] ^= 1
    digests = []
    for content in (data, changed):
      path.write_bytes(content)
      digests.append(cache._stamp(str(path))['digest'])
    seen.append(digests[0] != digests[1])
  assert sum(seen) == 50
  assert seen[:10] == seen[-10:] == [True] * 10


def test_a_cache_of_another_version_or_kind_is_written_again(criteo, tmp_path, place, monkeypatch, caplog):
  path, spec = criteo.write(tmp_path / 'a.csv', criteo.rows(100)), criteo.spec('')
  caplog.set_level(logging.INFO)
  monkeypatch.setattr(cache, 'VERSION', 0)
  cached(path, spec)
  monkeypatch.undo()
  assert_reads_like_the_file(path, spec)
  assert "'version': 0" in caplog.text
  for table in (
    pa.table({'a': [1]}),
    pa.table({}).replace_schema_metadata({'made_from': json.dumps(cache._stamp(path))}),
  ):
    with pa.ipc.new_file(str(place), table.schema) as writer:
      writer.write_table(table)
    assert_reads_like_the_file(path, spec)
  assert 'its schema is wrong' in caplog.text


@pytest.mark.parametrize('kind', ['cut', 'flip', 'zeros'])
def test_a_damaged_cache_is_never_used(criteo, tmp_path, place, kind):
  path, spec = criteo.write(tmp_path / 'a.csv', criteo.rows(150)), criteo.spec('')
  expected = packed(index_files(path, ''), spec)
  cached(path, spec)
  whole = place.read_bytes()
  rng = random.Random(0)
  of_schema = [whole.rindex(name) for name in (b'rows', b'150', b'made_from')]
  positions = [0, 1, len(whole) - 1, *of_schema, *rng.sample(range(len(whole)), 30)]
  for at in positions:
    damaged = bytearray(whole)
    if kind == 'cut':
      del damaged[at:]
    elif kind == 'flip':
      damaged[at] ^= 1 << rng.randrange(8)
    else:
      damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
    place.write_bytes(damaged)
    np.testing.assert_array_equal(packed(cached(path, spec), spec), expected)


def test_a_cache_without_its_last_rows_is_damaged(criteo, tmp_path, place, caplog):
  path, spec = criteo.write(tmp_path / 'a.csv', criteo.rows(150)), criteo.spec('')
  cached(path, spec)
  reader = pa.ipc.open_file(place.read_bytes())
  with pa.ipc.new_file(str(place), reader.schema) as writer:
    for i in range(reader.num_record_batches - 1):
      batch, metadata = reader.get_batch_with_custom_metadata(i)
      writer.write_batch(batch, custom_metadata=metadata)
  caplog.set_level(logging.INFO)
  assert_reads_like_the_file(path, spec)
  assert f'{place} is damaged (rows are missing)' in caplog.text


def test_a_bad_row_is_named_as_without_a_cache(criteo, tmp_path, place, caplog):
  rows = criteo.rows(300)
  rows[200][5] = 'x'
  path = criteo.write(tmp_path / 'a.csv', rows)
  strict, lenient = criteo.spec(''), criteo.spec('', on_bad_row='skip')
  with pytest.raises(DataError) as expected:
    packed(index_files(path, ''), strict)
  with pytest.raises(DataError) as found:
    cached(path, strict)
  assert str(found.value) == str(expected.value)
  assert [name for name in os.listdir(place.parent) if not name.endswith('.lock')] == []
  cached(path, lenient)
  assert 'skipped: ' in caplog.text
  assert 'line 201, field I5' in caplog.text
  caplog.clear()
  assert_reads_like_the_file(path, lenient)
  assert '1 bad rows are left out' in caplog.text
  with pytest.raises(DataError) as found:
    cached(path, strict)
  assert str(found.value) == str(expected.value)


def test_a_folder_that_cannot_be_written_to(criteo, tmp_path, monkeypatch, caplog):
  data, elsewhere = tmp_path / 'data', tmp_path / 'output/cache'
  data.mkdir()
  path, spec = criteo.write(data / 'a.csv', criteo.rows(100)), criteo.spec('')
  expected = packed(index_files(path, ''), spec)
  caplog.set_level(logging.INFO)
  make = os.makedirs

  def read_only(name, **options):
    if str(name).startswith(str(data)):
      raise OSError(30, 'Read-only file system', name)
    make(name, **options)

  monkeypatch.setattr(os, 'makedirs', read_only)
  for _ in range(2):
    np.testing.assert_array_equal(packed(index_cached(path, spec, str(elsewhere)), spec), expected)
  assert f'cache: not in {data / cache.FOLDER} (Read-only file system)' in caplog.text
  assert f'cache: 100 rows from {elsewhere}/a.csv-' in caplog.text
  assert len([name for name in os.listdir(elsewhere) if name.endswith('.arrow')]) == 1
  with pytest.raises(DataError, match=r'a\.csv, cannot be written \(Read-only file system\).*data.cache=False'):
    index_cached(path, spec, str(data / 'too'))

  monkeypatch.setattr(os, 'makedirs', make)
  cached(path, spec)
  monkeypatch.setattr(os, 'makedirs', read_only)
  caplog.clear()
  index_cached(path, spec, str(tmp_path / 'other'))
  assert f'100 rows from {data / cache.FOLDER}' in caplog.text


def test_files_of_one_name_in_two_folders_have_two_caches_elsewhere(criteo, tmp_path):
  places = [cache._places(str(tmp_path / folder / 'a.csv'), 'out') for folder in ('one', 'two')]
  assert places[0][1] != places[1][1]


def test_no_room(criteo, tmp_path, monkeypatch):
  path = criteo.write(tmp_path / 'a.csv', criteo.rows(100))
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage._replace(free=1000))
  with pytest.raises(DataError, match=r'a\.csv, needs 0\.0 GB, and 0\.0 GB are free; make room, or set data.cache=F'):
    cached(path, criteo.spec(''))


def test_a_file_that_changes_meanwhile(criteo, tmp_path, place, monkeypatch):
  path = criteo.write(tmp_path / 'a.csv', criteo.rows(100))
  index = cache.index_file

  def index_and_touch(*arguments):
    os.utime(path, ns=(5, 5))
    return index(*arguments)

  monkeypatch.setattr(cache, 'index_file', index_and_touch)
  with pytest.raises(DataError, match=r'a\.csv was changed while its cache was written'):
    cached(path, criteo.spec(''))
  assert not place.exists()


def test_without_locks_and_with_what_a_killed_process_left(criteo, tmp_path, place, monkeypatch):
  path = criteo.write(tmp_path / 'a.csv', criteo.rows(100))
  cached(path, criteo.spec(''))
  content = place.read_bytes()
  place.unlink()

  def no_locks(file, how):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(locks.fcntl, 'flock', no_locks)
  assert_reads_like_the_file(path, criteo.spec(''))
  assert place.read_bytes() == content
  monkeypatch.undo()
  place.unlink()
  unfinished = place.with_name(f'{place.name}.{cache.socket.gethostname()}.tmp')
  unfinished.write_bytes(content[: len(content) // 2])
  assert_reads_like_the_file(path, criteo.spec(''))
  assert not unfinished.exists()


SEVERAL = """
import hashlib, logging, sys
from dlrm_jax.data.cache import index_cached
from dlrm_jax.data.schema import DataSpec
logging.basicConfig(level=logging.INFO, force=True)  # absl was there first
spec = DataSpec('', (1000,) * 26)
index = index_cached(sys.argv[1], spec, '')
print(hashlib.sha256(index.read(0, index.rows, spec)).hexdigest())
"""


def test_of_several_processes_one_writes(criteo, tmp_path, repository):
  path = criteo.write(tmp_path / 'a.csv', criteo.rows(2000) * 20)
  command = [sys.executable, '-c', SEVERAL, path]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': repository}
  running = [subprocess.Popen(command, **pipes) for _ in range(3)]
  said = [process.communicate(timeout=120) for process in running]
  spec = criteo.spec('', buckets=(1000,) * 26)
  expected = cache.hashlib.sha256(packed(index_files(path, ''), spec)).hexdigest()
  assert [out.strip() for out, _ in said] == [expected] * 3
  assert sum('writing 40,000 rows' in err for _, err in said) == 1


def test_a_run_reads_through_caches_where_its_config_says_so(criteo, tmp_path):
  for name, count in (('train', 300), ('eval', 100)):
    criteo.write(tmp_path / f'{name}.csv', criteo.rows(count, seed=count))
  specs = [small_spec(tmp_path, tmp_path / 'out', data__cache=on) for on in (False, True)]
  opened = [sources.open_sources(spec) for spec in specs]
  assert sorted(path.name for path in (tmp_path / cache.FOLDER).glob('*.arrow')) == [
    'eval.csv.arrow',
    'train.csv.arrow',
  ]
  saved = [sources.to_saved(one, spec, sources.START) for one, spec in zip(opened, specs, strict=True)]
  assert saved[0] == saved[1]
  for kind, count in (('train', 20), ('eval', 100 // specs[0].batch_size)):
    parts = []
    for one, spec in zip(opened, specs, strict=True):
      make = pipeline.train_batches if kind == 'train' else pipeline.eval_batches
      more = (spec.seed,) if kind == 'train' else ()
      parts.append(take(make(getattr(one, kind), one.reading, spec.batch_size, *more), count))
    assert_same(*parts)
