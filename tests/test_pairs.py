"""All pairs of what tables can be asked for, each combination trained, evicted, grown, saved, restored and evaluated.

The ids are held against plain Python (tests/embeddings/reference_variables.py): the same rows, frequencies and steps.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import random

import jax
import numpy as np
import pytest

from configs import base
from dlrm_jax import bits, sources, train
from dlrm_jax import spec as specs
from dlrm_jax.checkpoint import delta
from dlrm_jax.checkpoint.full import Checkpoints
from dlrm_jax.embeddings import directory as directories
from dlrm_jax.evaluate import evaluate
from dlrm_jax.program import make_program
from dlrm_jax.state import init_state
from dlrm_jax.step import jit_predict
from dlrm_jax.stretches import Stretches, jit_train_stretch, stack_size
from dlrm_jax.upkeep import Upkeep
from tests.embeddings import reference_variables as reference
from tests.helpers import DEVICES, SMALL, crashing, devices, small_spec

STEPS, STOP = 120, 71
ROWS = 2000  # of the training data: 63 steps an epoch, the last one partial
EVICT_EVERY, THRESHOLD = 16, 3

# Axis -> value -> fields of the config.
AXES = {
  'kind': {kind: {'embedding.kind': kind} for kind in ('static', 'multi_hash', 'dynamic', 'adaptive')},
  'admission': {
    'always': {},
    'counter': {'embedding.admission.name': 'counter'},
    'counting_bloom': {'embedding.admission.name': 'counting_bloom'},
  },
  'eviction': {
    'never': {'embedding.rows': 3072},
    'global_step': {'embedding.eviction.name': 'global_step', 'embedding.eviction.steps_to_live': 12},
    'l2': {'embedding.eviction.name': 'l2', 'embedding.eviction.l2': 0.25},
  },
  'width': {'full': {}, 'dynamic': {'embedding.width.name': 'dynamic', 'embedding.width.every': 25}},
  'optimizer': {
    name: {'optimizer.name': name, 'optimizer.learning_rate': rate, 'optimizer.accumulator_decay_steps': 50}
    for name, rate in (
      ('adam', 0.01), ('adamasync', 0.01), ('adagraddecay', 0.05), ('adagrad', 0.05), ('gradientdescent', 0.1)
    )
  },
  'mlps': {dtype: {'model.dtype': dtype} for dtype in ('float32', 'bfloat16')},
  'tables': {dtype: {'embedding.dtype': dtype} for dtype in ('float32', 'bfloat16')},
  'slices': {str(slices): {'micro_batch': slices} for slices in (1, 2)},
  'fusion': {'fused': {}, 'apart': {
    'embedding.fusion': False, 'embedding.rows': 26 * 1024, 'embedding.admission.expected_ids': 26 * 1024
  }},
  'devices': DEVICES | {
    '2': DEVICES['2'] | {'embedding.exchange': 'gather'}, '4': DEVICES['4'] | {'embedding.exchange': 'all_to_all'}
  },
  'kernels': {'native': {}, 'xla': {'native': False}},
  'checkpoints': {'whole': {}, 'deltas': {'delta_seconds': 100.0}},
}  # fmt: skip
# All combinations of these are rows, not pairs alone.
OF_IDS = ('kind', 'admission', 'eviction', 'width')
COMMON = {
  **SMALL, 'embedding.rows': 2048, 'embedding.admission.threshold': THRESHOLD, 'embedding.admission.expected_ids': 2048,
  'embedding.eviction.every': EVICT_EVERY, 'data.streams': 1, 'data.shuffle_rows': 0, 'steps': STEPS,
}  # fmt: skip


SLOW = ('apart',)  # to compile 26 tables takes minutes


def fields_of(row):
  """The fields of a config that a row, or some of its values, stands for."""
  return COMMON | {name: value for axis in row for name, value in AXES[axis][row[axis]].items()}


@functools.cache
def _refusal(items):
  config = base.get_config()
  config.update_from_flattened_dict(fields_of(dict(items)))
  try:
    specs.from_config(config)
  except specs.SpecError as error:
    return str(error)
  return ''


def refusal(row):
  """What `spec.from_config` says against a row; empty if it takes it."""
  return _refusal(tuple(sorted(row.items())))


def pairs_of(row):
  """The pairs of an axis and its value, two by two."""
  return set(itertools.combinations(sorted(row.items()), 2))


def all_rows(axes):
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*(AXES[axis] for axis in axes))]


@functools.cache
def possible():
  """(combinations of OF_IDS that are taken, pairs that are in a row that is taken)."""
  taken = [row for row in all_rows(OF_IDS) if not refusal(row)]
  pairs = set()
  for one, other in itertools.combinations(sorted(AXES), 2):
    for pair in all_rows((one, other)):
      if any(not refusal(row | pair) for row in taken if pairs_of(row | pair) >= pairs_of(pair) and _agree(row, pair)):
        pairs |= pairs_of(pair)
  return taken, pairs


def _agree(row, pair):
  return all(row.get(axis, value) == value for axis, value in pair.items())


def make_rows():
  """Every combination of OF_IDS, and then rows until every pair is in one: greedy, and always the same."""
  taken, wanted = possible()
  pending, wanted, used, rows = list(taken), set(wanted), collections.Counter(), []
  while pending or wanted:
    row = dict(pending.pop(0) if pending else min(wanted))
    for axis in [axis for axis in AXES if axis not in row]:
      row[axis] = _best(row, axis, wanted, used)
    rows.append({axis: row[axis] for axis in AXES})
    wanted -= pairs_of(row)
    used.update(pairs_of(row))
  return rows


def _best(row, axis, wanted, used):
  """Of the values that bring most new pairs a quick one, and then the one whose pairs are in fewest rows."""
  new = lambda value: len(wanted & (pairs_of(row | {axis: value}) - pairs_of(row)))
  often = lambda value: sum(used[pair] for pair in pairs_of(row | {axis: value}))
  values = [value for value in AXES[axis] if pairs_of(row | {axis: value}) <= possible()[1]]
  return max(values, key=lambda value: (new(value), value not in SLOW, -often(value)))


def quick(rows, count=2):
  """Few rows with as many values as so few can have."""
  rows, seen, out = [row for row in rows if not {*SLOW} & {*row.values()}], set(), []
  for _ in range(count):
    out.append(max(rows, key=lambda row: len(set(row.items()) - seen)))
    seen |= set(out[-1].items())
  return out


ROWS_OF_MATRIX = make_rows()


def test_every_pair_is_in_a_row_or_refused():
  """What is refused, written down once more: tables without ids know nothing of them, and adaptive ones count."""
  covered = set().union(*map(pairs_of, ROWS_OF_MATRIX))
  no_ids = {('kind', 'static'), ('kind', 'multi_hash')}
  without = {('admission', 'counter'), ('admission', 'counting_bloom'), ('eviction', 'global_step'), ('eviction', 'l2')}
  without.add(('width', 'dynamic'))
  for one, other in itertools.combinations(sorted(AXES), 2):
    for pair in map(frozenset, (row.items() for row in all_rows((one, other)))):
      senseless = (pair & no_ids and pair & without) or pair == {('kind', 'adaptive'), ('admission', 'always')}
      assert (tuple(sorted(pair)) in covered) == (not senseless), pair
  assert 30 <= len(ROWS_OF_MATRIX) <= 60


def test_what_makes_no_sense_is_refused_in_one_line():
  refused = [row for row in all_rows(OF_IDS) if refusal(row)]
  assert len(refused) == len(all_rows(OF_IDS)) - len(possible()[0]) > 0
  for row in refused:
    assert refusal(row).startswith('config.embedding.')
    assert 'set it to' in refusal(row)
    assert '\n' not in refusal(row)


@pytest.fixture(scope='module')
def stream(tmp_path_factory):
  """train.csv and eval.csv in the order of time: ids come and go, C2 has most of them, and the click depends on C1."""
  folder = tmp_path_factory.mktemp('stream')
  rng = random.Random(0)

  def row(time):
    c1 = rng.randrange(4)
    label = int(rng.random() < (0.03, 0.2, 0.75, 0.97)[c1])
    integers = [str(rng.randrange(100)) if rng.random() < 0.8 else '' for _ in range(13)]
    old = lambda share: int(time * share) - int(rng.paretovariate(1.2))  # mostly new ids, some of long ago
    ids = [c1, old(0.6), *(old(0.015) for _ in range(24))]
    text = [f'{id % 2**32:08x}' if column < 2 or rng.random() < 0.95 else '' for column, id in enumerate(ids)]
    return ','.join([str(label), *integers, *text]) + '\n'

  (folder / 'train.csv').write_text(''.join(row(time) for time in range(ROWS)))
  (folder / 'eval.csv').write_text(''.join(row(ROWS) for _ in range(200)))
  return folder


@pytest.fixture(autouse=True)
def forget_programs():
  """Rows compile programs of their own; all of them together would take gigabytes."""
  yield
  jax.clear_caches()


def parameters():
  few = quick(ROWS_OF_MATRIX)
  marks = lambda row: () if row in few else pytest.mark.slow
  return [pytest.param(row, id='-'.join(row.values()), marks=marks(row)) for row in ROWS_OF_MATRIX]


@pytest.mark.parametrize('row', parameters())
def test_a_row_trains_evicts_stops_goes_on_and_evaluates(stream, tmp_path, row, capsys, monkeypatch):
  spec = small_spec(stream, tmp_path, checkpoint=str(tmp_path / 'c'), **fields_of(row))
  axis = devices(int(row['devices']))
  program = make_program(spec, axis)
  run = Whole(program)
  with sources.train_batches(
    sources.open_sources(spec), spec, sources.START, axis, stack=stack_size(program)
  ) as batches:
    stretches = Stretches(batches)
    for number in range(1, STEPS + 1):
      run.step(stretches.take(1), number)
  assert_learned(run.losses)
  if run.state.known:
    assert_ids(run, row)

  before = jax.device_get(run.state)
  with sources.eval_batches(sources.open_sources(spec), spec, axis) as batches:
    evaluation = evaluate(jit_predict(program), run.state, (batch for batch, _ in batches))
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.state))
  assert evaluation['examples'] == 200
  assert evaluation['auc'] > 0.6
  assert all(np.isfinite(value) for value in evaluation.values())

  monkeypatch.setattr(train, 'all_devices', lambda: axis)
  if spec.delta_seconds:
    monkeypatch.setattr(delta, 'MOST', math.inf)  # of so few rows nearly all change
    with crashing(deltas=(35, 50, 65), after=70):
      train.run(spec)
  else:
    train.run(dataclasses.replace(spec, steps=STOP))
  train.run(spec)
  jax.tree.map(np.testing.assert_array_equal, without_scratch(before), without_scratch(saved(spec)))
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert {name: printed[name] for name in evaluation if name in printed} == {
    name: value for name, value in evaluation.items() if name != 'examples'
  }


class Whole:
  """A run that is never stopped, beside plain Python."""

  def __init__(self, program):
    self.program, self.state = program, init_state(program)
    self.step_fn, self.upkeep = jit_train_stretch(program), Upkeep(program)
    self.losses, self.load = [], 0.0
    pages = lambda directory: directory.entry.shape[0]
    known = self.state.known
    columns = {name: program.embeddings.layout[name].columns for name in known}
    filters = {name: vocabulary.filter for name, vocabulary in known.items()}
    waiting = {name: pages(filter) for name, filter in filters.items() if hasattr(filter, 'entry')}
    first = {name: pages(vocabulary.directory) for name, vocabulary in known.items()}
    self.expected = reference.Program(program.spec.embedding, columns, first, waiting) if known else None

  def step(self, stretch, number):
    """The step of this number, counted from 1, and what happens after it."""
    self.state, metrics = self.step_fn(self.state, stretch)
    alone = stack_size(self.program) == 1
    batch = stretch.batches if alone else jax.tree.map(lambda leaf: leaf[stretch.first], stretch.batches)
    self.losses.append(float(metrics['loss']))
    if self.expected:
      self.expected.lookup(ids_of(batch), number - 1)
      short = {name: self.short(name) for name in self.state.known} if number % EVICT_EVERY == 0 else None
      self.load = max(self.load, *(len(one.ids.known) / one.ids.rows for one in self.expected.tables.values()))
      self.expected.upkeep(number, short)
    self.state = self.upkeep(self.state, number)

  def short(self, name):
    """The ids of a table whose vectors are short: they follow from the vectors alone."""
    value = np.asarray(bits.widen(self.state.tables[name].value), np.float64)
    is_short = 0.5 * np.sum(value**2, axis=1) < self.program.spec.embedding.eviction.l2
    return {id for id, (row, _, _) in known_of(self.state.known[name].directory).items() if is_short[row]}


def ids_of(batch):
  """(low, high, column) by example; None in those that only fill up."""
  key, weight = np.asarray(batch.key).tolist(), np.asarray(batch.weight)
  return [
    [(*halves, column) if real else None for column, halves in enumerate(example)]
    for example, real in zip(key, weight > 0, strict=True)
  ]


def known_of(directory):
  """{id: (row, frequency, step of the last lookup)}; a row is free exactly when its frequency is 0."""
  (key, feature), frequency, version = jax.device_get(directories.entries(directory))
  rows = np.flatnonzero(frequency)
  known = {
    (int(key[row, 0]), int(key[row, 1]), int(feature[row])): (int(row), int(frequency[row]), int(version[row]))
    for row in rows
  }
  assert len(known) == len(rows) == int(directory.used)
  return known


def assert_ids(run, row):
  """The program's ids are those of plain Python; its tables were full, and lost ids where they were to."""
  expected = run.expected
  for name, known in run.state.known.items():
    table, counts = expected.tables[name], jax.device_get(known.counts)
    assert known_of(known.directory) == {id: tuple(entry) for id, entry in table.ids.known.items()}
    if row['admission'] == 'counter':
      assert known_of(known.filter) == {id: tuple(entry) for id, entry in table.admission.waiting.known.items()}
    if row['admission'] == 'counting_bloom':
      assert known.filter.reshape(-1).tolist() == table.admission.counters
    assert {field: int(getattr(counts, field).sum()) for field in expected.counts[name]} == expected.counts[name]
    assert run.state.tables[name].value.shape[0] == table.ids.rows
  total = sum(map(collections.Counter, expected.counts.values()), collections.Counter())
  assert run.load > (0.35 if row['fusion'] == 'fused' else 0.1)
  assert (total['evicted'] > 0) == (row['eviction'] != 'never')
  assert (total['refused'] > 0) == (row['admission'] != 'always')


def assert_learned(losses):
  assert np.isfinite(losses).all()
  assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.02


def saved(spec):
  """The newest state of a run, as one device restores it."""
  with Checkpoints(train.run_folder(spec) / 'checkpoints', 1) as checkpoints:
    return jax.device_get(checkpoints.restore(make_program(spec)).state)


def without_scratch(state):
  return state.replace(tables={name: table.replace(scratch=0) for name, table in state.tables.items()})
