"""The report and the export of a checkpoint, beside counts of the CSV in plain Python and the state Orbax restores."""

import collections
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from pyarrow import parquet

from dlrm_jax import inspect_checkpoint, sources, train
from dlrm_jax.checkpoint import contents
from dlrm_jax.data.schema import CATEGORIES, MISSING
from dlrm_jax.embeddings.hashing import fingerprint64
from dlrm_jax.embeddings.layout import static_layout
from tests.helpers import execute, small_spec
from tests.test_train import STEPS, state_of

COUNTER = {'embedding__admission__name': 'counter', 'embedding__admission__threshold': 17,
           'embedding__admission__expected_ids': 2000}  # fmt: skip
ROOM = {'embedding__rows': 2000}
RUNS = {
  'always': ROOM | {'embedding__kind': 'dynamic', 'embedding__fusion': False, 'optimizer__name': 'adagrad'},
  'counter': ROOM | COUNTER | {'embedding__kind': 'dynamic', 'optimizer__name': 'adagraddecay'},
  'bloom': ROOM | COUNTER | {'embedding__kind': 'adaptive', 'embedding__dtype': 'bfloat16',
                             'embedding__admission__name': 'counting_bloom'},
  'static': {'embedding__buckets': tuple(range(40, 66)), 'embedding__shard_mb': 0.0,
             'optimizer__name': 'gradientdescent'},
}  # fmt: skip
KEYED = (pytest.param('always', marks=pytest.mark.slow), 'counter', 'bloom')  # 26 tables take a minute
SHARED = ('static', 'bloom')


class Runs(dict):
  """{name: (folder, spec)} of runs of one epoch, made when they are asked for, whose data is gone."""

  def __init__(self, criteo, folder):
    self.criteo, self.folder = criteo, folder

  def __missing__(self, name):
    data = shutil.copytree(self.criteo, self.folder / f'data_{name}')
    spec = small_spec(data, self.folder, checkpoint=str(self.folder / name), no_eval=True, **RUNS[name])
    with contextlib.redirect_stdout(io.StringIO()):
      train.run(spec)
    shutil.rmtree(data)
    self[name] = self.folder / name, spec
    return self[name]


@pytest.fixture(scope='module')
def runs(criteo, tmp_path_factory):
  return Runs(criteo, tmp_path_factory.mktemp('runs'))


@pytest.fixture(scope='module')
def occurrences(criteo):
  """{column: {key: occurrences in the training file}}."""
  with (criteo / 'train.csv').open() as file:
    rows = [row[14:] for row in csv.reader(file)]
  return {
    name: collections.Counter(fingerprint64(row[i].encode() or MISSING) for row in rows)
    for i, name in enumerate(CATEGORIES)
  }


@pytest.fixture(scope='module')
def last_seen(criteo, runs):
  """{column: {key: the step that saw it last}}."""
  spec = small_spec(criteo, criteo, **RUNS['always'])
  seen = {name: {} for name in CATEGORIES}
  with sources.train_batches(sources.open_sources(spec), spec, sources.START) as batches:
    for step in range(STEPS):
      batch, _ = next(batches)
      for keys, weight in zip(np.asarray(batch.key, np.uint64).tolist(), batch.weight.tolist(), strict=True):
        for name, (low, high) in zip(CATEGORIES, keys, strict=True):
          if weight:
            seen[name][low | high << 32] = step
  return seen


def run(capsys, *arguments):
  assert inspect_checkpoint.main([str(argument) for argument in arguments]) == 0
  out, err = capsys.readouterr()
  assert err == ''
  return out


def report_of(capsys, *arguments):
  return json.loads(run(capsys, *arguments, '--json'))


def numbers(array):
  """Float32 of what a table stores: bfloat16 is the upper half of the bits."""
  return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def rows_of_ids(state, spec):
  """{column: {key: (frequency, version, vector)}}, by a loop over the entries of the directories."""
  found = {name: {} for name in CATEGORIES}
  for name in static_layout(spec.embedding):
    entry, value = state['known'][name]['directory']['entry'], numbers(state['tables'][name]['value'])
    pages, buckets, _, ways = entry.shape
    for page, bucket, way in np.ndindex(pages, buckets, ways):
      low, high, frequency, stamp = entry[page, bucket, :, way].tolist()
      if frequency:
        row = (page * buckets + bucket) * ways + way
        found[CATEGORIES[stamp % 32]][low | high << 32] = (frequency, stamp // 32, value[row])
  return found


def quantiles(values):
  """The values at the places that the report names."""
  ordered, last = sorted(values), len(values) - 1
  places = {'min': 0, 'q25': 0.25, 'median': 0.5, 'q75': 0.75, 'max': 1}
  return {name: ordered[round(q * last)] for name, q in places.items()}


def assert_norms(report, vectors):
  norms = [math.sqrt(sum(x * x for x in vector.tolist())) for vector in vectors]
  assert report == pytest.approx(quantiles(norms) | {'mean': sum(norms) / len(norms)}, rel=1e-5)


@pytest.mark.parametrize('name', KEYED)
def test_ids_are_those_of_the_file(runs, occurrences, last_seen, capsys, name):
  folder, spec = runs[name]
  report = report_of(capsys, folder, '--top', 4)
  trained = rows_of_ids(state_of(folder, STEPS), spec)
  least = 1 if name == 'always' else 17
  assert list(report['variables']) == list(CATEGORIES)
  for column, found in report['variables'].items():
    counted = occurrences[column]
    admitted = {key: count for key, count in counted.items() if count >= least}
    rows = trained[column]
    if name == 'bloom':  # a filter lets some in too early, and counts from then on
      assert set(admitted) <= set(rows)
      admitted = {key: frequency for key, (frequency, _, _) in rows.items()}
    assert found['ids'] == len(admitted) == found['admitted']
    assert found['waiting'] == (None if name == 'bloom' else len(counted) - len(admitted))
    assert found['lookups'] == counted.total() == 600
    assert found['evicted'] == found['unplaced'] == 0
    powers = collections.Counter(str(1 << count.bit_length() - 1) for count in admitted.values())
    assert {power: number for power, number in found['frequencies'].items() if number} == powers
    assert found['version'] == quantiles([last_seen[column][key] for key in admitted])
    often = sorted(admitted.items(), key=lambda item: (-item[1], item[0]))[:4]
    assert [(top['key'], top['frequency'], top['version']) for top in found['top']] == [
      (f'{key:016x}', count, last_seen[column][key]) for key, count in often
    ]
    for top in found['top']:
      assert top['norm'] == pytest.approx(np.linalg.norm(rows[int(top['key'], 16)][2]), rel=1e-5)
    assert_norms(found['norm'], [vector for _, _, vector in rows.values()])
  assert min(found['ids'] for found in report['variables'].values()) > 0


@pytest.mark.parametrize('name', SHARED)
def test_rows_of_buckets_are_those_of_the_state(runs, capsys, name):
  folder, spec = runs[name]
  report = report_of(capsys, folder)
  state = state_of(folder, STEPS)
  assert list(report['static']) == list(CATEGORIES)
  for column, found in report['static'].items():
    assert_norms(found['norm'], rows_of_column(state, spec, column, found['table']))
    assert found['rows'] == spec.embedding.buckets[CATEGORIES.index(column)]


def rows_of_column(state, spec, column, name):
  """A column's rows, where its table has them: under each other, and dealt out in blocks of 64 if it can be cut."""
  value, buckets = numbers(state['tables'][name]['value']), spec.embedding.buckets
  place = CATEGORIES.index(column)
  first = sum(buckets[:place])
  rows = np.arange(first, first + buckets[place])
  if spec.embedding.shard_mb == 0:
    block, inside = np.divmod(rows, 64)
    turn, part = np.divmod(block, 960)
    rows = (part * 593 % 960 * (len(value) // 64 // 960) + turn) * 64 + inside
  return value[rows]


@pytest.mark.parametrize('name', [*KEYED, 'static'])
def test_tables_and_bytes(runs, capsys, name):
  folder, spec = runs[name]
  report, state = report_of(capsys, folder), state_of(folder, STEPS)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  assert report['step'] == STEPS
  assert report['position']['rows'] == 600
  assert report['bytes'] == {part: size(tree) for part, tree in state.items()}
  assert set(report['tables']) == set(state['tables'])
  for table, found in report['tables'].items():
    saved = state['tables'][table]
    assert [found['rows'], found['dim']] == list(saved['value'].shape)
    assert found['dtype'] == spec.embedding.dtype
    slots = saved['slots'] or {}  # gradient descent has none
    assert {slot: part['bytes'] for slot, part in found['slots'].items()} == {
      slot: array.nbytes for slot, array in slots.items()
    }
    assert found['bytes'] == size(saved) + size(state.get('known', {}).get(table, {}))
    if found['kind'] == 'variables':
      assert found['load'] == found['ids'] / found['rows']
      # Value and slots as they are saved, 16 bytes of the id, 4 of the table's scratch.
      per_row = sum(leaf[0].nbytes for leaf in (saved['value'], *slots.values()) if leaf.ndim)
      assert found['bytes_per_row'] == per_row + 16 + 4
  for found in report['variables'].values():
    per_row = report['tables'][found['table']]['bytes_per_row']
    assert found['bytes'] == found['ids'] * per_row + (found['waiting'] or 0) * 16
  assert report['config']['embedding.dim'] == {'base': 16, 'checkpoint': 8}
  assert ('embedding.kind' in report['config']) == (name in KEYED)
  assert 'optimizer.b1' not in report['config']


@pytest.mark.parametrize('name', KEYED)
def test_export_of_ids(runs, tmp_path, monkeypatch, capsys, name):
  monkeypatch.setattr(contents, 'ROWS', 7)
  folder, spec = runs[name]
  run(capsys, folder, '--parquet', tmp_path / 'ids.parquet')
  table = parquet.read_table(tmp_path / 'ids.parquet')
  assert table.schema.names == ['feature', 'key', 'frequency', 'version', 'vector']
  assert [str(kind) for kind in table.schema.types[1:]] == [
    'uint64', 'uint32', 'int32', 'fixed_size_list<element: float>[8]'
  ]  # fmt: skip
  expected = rows_of_ids(state_of(folder, STEPS), spec)
  found = {(row['feature'], row['key']): row for row in table.to_pylist()}
  assert len(found) == table.num_rows == sum(map(len, expected.values()))
  for column, rows in expected.items():
    for key, (frequency, version, vector) in rows.items():
      row = found[column, key]
      assert (row['frequency'], row['version'], row['vector']) == (frequency, version, vector.tolist())
  groups = parquet.ParquetFile(tmp_path / 'ids.parquet').metadata.num_row_groups
  assert groups == sum(-(-len(rows) // 7) for rows in expected.values())
  shared = ['ids.shared.parquet'] if name == 'bloom' else []
  assert sorted(os.listdir(tmp_path)) == ['ids.parquet', *shared]


@pytest.mark.parametrize('name', SHARED)
def test_export_of_rows(runs, tmp_path, monkeypatch, capsys, name):
  monkeypatch.setattr(contents, 'ROWS', 13)
  folder, spec = runs[name]
  run(capsys, folder, '--parquet', tmp_path / 'rows.parquet')
  path = tmp_path / ('rows.shared.parquet' if name == 'bloom' else 'rows.parquet')
  table, state = parquet.read_table(path), state_of(folder, STEPS)
  assert table.schema.names == ['column', 'row', 'vector']
  name = 'shared_fused' if name == 'bloom' else 'fused'
  expected = [
    {'column': column, 'row': row, 'vector': vector}
    for column in CATEGORIES
    for row, vector in enumerate(rows_of_column(state, spec, column, name).tolist())
  ]
  assert table.to_pylist() == expected


def test_one_feature_alone(runs, tmp_path, capsys):
  folder, _ = runs['bloom']
  path = tmp_path / 'c3.parquet'
  whole, one = report_of(capsys, folder), report_of(capsys, folder, '--feature', 'C3', '--parquet', path)
  assert one['variables'] == {'C3': whole['variables']['C3']}
  assert one['static'] == {'C3': whole['static']['C3']}
  assert set(parquet.read_table(path)['feature'].to_pylist()) == {'C3'}


@pytest.mark.slow
def test_the_table_of_one_feature_alone(runs, capsys):
  folder, _ = runs['always']
  assert list(report_of(capsys, folder, '--feature', 'C3')['tables']) == ['C3']


def test_the_command_has_tables_for_people_and_builds_nothing(runs, tmp_path, repository):
  folder, _ = runs['counter']
  command = [sys.executable, '-m', 'dlrm_jax.inspect_checkpoint', str(folder), '--top', '1']
  code, out, err = execute(command, repository, XDG_CACHE_HOME=str(tmp_path))
  assert (code, err) == (0, '')
  assert list(tmp_path.iterdir()) == []
  blocks = dict(block.split('\n', 1) for block in out.rstrip().split('\n\n')[1:])
  ids = [line.split() for line in blocks['ids'].splitlines()]
  assert ids[0][:3] == ['column', 'ids', 'waiting']
  assert [line[0] for line in ids[1:]] == list(CATEGORIES)
  assert ids[1][1:4] == ['4', '0', '600']  # C1 has four ids, all seen often enough
  assert len(blocks['most frequent ids'].splitlines()) == 1 + 26
  assert '"dynamic"' in blocks['config, where it is not configs/base.py']


def test_nothing_is_written_and_unfinished_checkpoints_are_left_alone(runs, tmp_path, capsys):
  folder = shutil.copytree(runs['counter'][0], tmp_path / 'run')
  unfinished = folder / 'checkpoints' / '20.orbax-checkpoint-tmp'
  shutil.copytree(folder / 'checkpoints' / str(STEPS), unfinished)
  before = fingerprints(folder)
  whole = report_of(capsys, folder)
  for path in (folder / 'checkpoints', folder / 'checkpoints' / str(STEPS)):
    assert report_of(capsys, path, '--step', STEPS) == whole
  assert whole['step'] == STEPS
  assert inspect_checkpoint.main([str(folder), '--parquet', str(folder / f'checkpoints/{STEPS}/a.parquet')]) == 1
  assert fingerprints(folder) == before


def fingerprints(folder):
  return {
    path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None)
    for path in [folder, *folder.rglob('*')]
  }


def test_what_cannot_be_read_is_one_line(runs, tmp_path, capsys):
  folder = shutil.copytree(runs['counter'][0], tmp_path / 'run')
  checkpoint = folder / 'checkpoints' / str(STEPS)

  def error(*arguments):
    assert inspect_checkpoint.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    return err

  assert 'is not a folder' in error(tmp_path / 'nothing')
  (tmp_path / 'empty').mkdir()
  assert 'no complete checkpoint' in error(tmp_path / 'empty')
  assert f'no checkpoint of step 5; there are {STEPS}' in error(folder, '--step', 5)
  assert f'of step {STEPS}, not of 5' in error(checkpoint, '--step', 5)
  assert 'nothing.parquet' in error(folder, '--parquet', tmp_path / 'no' / 'nothing.parquet')
  assert f'{tmp_path / "empty"} is a folder' in error(folder, '--parquet', tmp_path / 'empty')
  large = [path for path in (checkpoint / 'state').rglob('*') if path.is_file() and path.stat().st_size > 10000]
  for path in large:
    path.write_bytes(path.read_bytes()[:5000])
  assert large
  assert f'{checkpoint} cannot be read' in error(folder, '--parquet', tmp_path / 'half.parquet')
  assert sorted(os.listdir(tmp_path)) == ['empty', 'run']
  (checkpoint / 'config' / 'metadata').unlink()
  assert f'{checkpoint} cannot be read' in error(folder)


@pytest.mark.parametrize('arguments', [['--feature', 'C27'], ['--top', '-1'], ['--step', 'x'], ['--what']])
def test_a_wrong_command_ends_with_2(tmp_path, capsys, arguments):
  with pytest.raises(SystemExit) as error:
    inspect_checkpoint.main([str(tmp_path), *arguments])
  assert error.value.code == 2
  assert arguments[0] in capsys.readouterr().err


def test_columns_without_ids_have_no_quantiles(tmp_path, criteo, capsys):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), no_eval=True, steps=1, **RUNS['counter'])
  train.run(spec)
  capsys.readouterr()
  report = report_of(capsys, tmp_path / 'c', '--feature', 'C5', '--parquet', tmp_path / 'ids.parquet')
  found = report['variables']['C5']
  assert (found['ids'], found['top'], found['frequencies']) == (0, [], {})
  assert set(found['version'].values()) == set(found['norm'].values()) == {None}
  assert found['waiting'] > 0
  assert parquet.read_table(tmp_path / 'ids.parquet').num_rows == 0
