"""Embedding variables as a training program has them, against plain Python over sequences that hypothesis makes up:
the same rows, frequencies, widths and vectors, through every optimizer, eviction, growth and new widths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings.directory import Ids
from dlrm_jax.embeddings.exchange import by_lookup
from dlrm_jax.embeddings.first_values import initial_vectors
from dlrm_jax.native import build
from dlrm_jax.program import make_program
from dlrm_jax.sharding import CUT, WHOLE
from dlrm_jax.state import init_state, state_specs
from dlrm_jax.structs import Batch, TrainState
from dlrm_jax.upkeep import Upkeep
from tests.embeddings import reference_variables as reference
from tests.helpers import DEVICES, devices, small_spec
from tests.optim import reference as optimizers

EXAMPLES, COLUMNS, DIM, RATE, BUCKETS = 3, 26, 8, 0.05, 50
EVICT_EVERY, PERIOD = 6, 5
COUNTER, BLOOM = {'admission.name': 'counter'}, {'admission.name': 'counting_bloom'}
OLD = {'eviction.name': 'global_step', 'eviction.steps_to_live': 7}
SHORT = {'eviction.name': 'l2', 'eviction.l2': 0.3}
WIDTH = {'width.name': 'dynamic', 'width.every': PERIOD}
# Name -> (case of tests/optim/reference.py, fields of the embedding).
RUNS = {
  'dynamic_always_old': ('adagraddecay', OLD),
  'dynamic_always_short': ('adamasync', SHORT),
  'dynamic_counter_old_width': ('adam', COUNTER | OLD | WIDTH),
  'dynamic_bloom_short_width': ('adamasync_rmsprop', BLOOM | SHORT | WIDTH),
  'adaptive_counter_short_width': ('adagrad', {'kind': 'adaptive'} | COUNTER | SHORT | WIDTH),
  'adaptive_bloom_old': ('gradientdescent', {'kind': 'adaptive'} | BLOOM | OLD),
}
COMMON = {
  'kind': 'dynamic', 'dim': DIM, 'buckets': (BUCKETS,), 'rows': 512, 'eviction.every': EVICT_EVERY,
  'admission.threshold': 3, 'admission.expected_ids': 1024,
}  # fmt: skip

# A run: what its numbers are taken modulo (small: ids come often), how fast they drift, and its batches: a byte for
# each lookup, and how many of the examples are there.
lookups = st.tuples(st.binary(min_size=EXAMPLES * COLUMNS, max_size=EXAMPLES * COLUMNS), st.integers(1, EXAMPLES))
runs = st.tuples(st.sampled_from([2, 7, 256]), st.sampled_from([1, 4, 50]), st.lists(lookups, min_size=12, max_size=40))


@functools.cache
def make(name, native, number, exchange):
  """(program, training of tables, what evaluation sees), compiled."""
  case, fields = RUNS[name]
  optimizer, options, _, _ = optimizers.CASES[case]
  fields = {f'embedding.{field}': value for field, value in (COMMON | fields).items()}
  fields |= {'optimizer.name': optimizer, 'optimizer.learning_rate': RATE, 'optimizer.rmsprop': 'rmsprop' in options}
  fields |= {'optimizer.accumulator_decay_steps': 7, 'optimizer.accumulator_decay_rate': 0.6, 'native': native}
  fields |= {'embedding.rows': 512 * number, 'embedding.exchange': exchange}
  program = make_program(small_spec('data', 'result', **fields | DEVICES[str(number)]), devices(number))
  embeddings, named = program.embeddings, state_specs(program)
  tables_and_ids = named.tables, named.known

  def train(tables, known, batch, gradient, step):
    tables, known, found = embeddings.resolve(tables, known, batch, step)
    vectors = embeddings.lookup(tables, found)
    return embeddings.update(tables, found, gradient, step), known, (rows_in_whole(found, known), found.mask), vectors

  def evaluate(tables, known, batch):
    found = embeddings.find(known, batch)
    return (rows_in_whole(found, known), found.mask), embeddings.lookup(tables, found)

  def rows_in_whole(found, known):
    """Rows of the whole table; no device has the row: its number of rows."""
    row, size = found.rows['fused'], directories.rows_of(known['fused'].directory)
    if embeddings.is_routed('fused'):
      routed = jnp.where(row.row < size, row.owner * size + row.row, size * number)
      return program.axis.gather(by_lookup(row, routed, size * number))
    if not embeddings.is_cut('fused'):
      return row
    own = program.axis.sum(jnp.where(row < size, row + program.axis.index() * size - size * number, 0))
    return own + size * number

  found = (WHOLE, CUT)
  over_train = program.axis.over(train, (*tables_and_ids, CUT, CUT, WHOLE), (*tables_and_ids, found, CUT))
  over_evaluate = program.axis.over(evaluate, (*tables_and_ids, CUT), (found, CUT))
  return program, jax.jit(over_train, donate_argnums=(0, 1)), jax.jit(over_evaluate)


def ids_of(run, step):
  """(low, high, column) by example; None where there is no example."""
  spread, drift, batches = run
  numbers, real = batches[step]
  id = lambda number, column: (number % 5 + 1, number * 0x9E3779B1 % 2**32, column)
  number = lambda byte: byte % spread + step // drift
  return [
    [id(number(numbers[example * COLUMNS + c]), c) if example < real else None for c in range(COLUMNS)]
    for example in range(EXAMPLES)
  ]


def bucket_of(id):
  low, high, column = id
  return column, (low * 31 + high) % BUCKETS


def batch_of(ids):
  lanes = [id or (0, 0, 0) for example in ids for id in example]
  shaped = lambda numbers, *shape: np.array(numbers, np.uint32).reshape(EXAMPLES, *shape)
  return Batch(
    label=np.zeros(EXAMPLES, np.float32),
    dense=np.zeros((EXAMPLES, 13), np.float32),
    bucket=shaped([bucket_of(id)[1] for id in lanes], COLUMNS),
    weight=np.array([example[0] is not None for example in ids], np.float32),
    key=shaped([id[:2] for id in lanes], COLUMNS, 2),
  )


jit_initial = jax.jit(lambda seed, key, column: initial_vectors(seed, Ids(key, column), DIM), static_argnums=0)


@functools.cache
def initial_of(seed, id):
  key, column = jnp.array([id[:2]], jnp.uint32), jnp.array([id[2]], jnp.uint32)
  return np.asarray(jit_initial(seed, key, column)[0], np.float64)


class Pair:
  """A program's tables, and the same in plain Python."""

  def __init__(self, name, native, number, exchange):
    self.case, _ = RUNS[name]
    self.program, self.jit_train, self.jit_evaluate = make(name, native, number, exchange)
    self.upkeep = Upkeep(self.program)
    state = init_state(self.program)
    self.tables, self.known = state.tables, state.known
    layout, spec = self.program.embeddings.layout['fused'], self.program.spec
    vectors = {'initial': functools.partial(initial_of, spec.seed), 'case': self.case, 'rate': RATE}
    if spec.embedding.kind == 'adaptive':
      place = layout.dealt(jnp.arange(COLUMNS * BUCKETS))
      value = np.asarray(self.tables['shared_fused'].value, np.float64)[place].reshape(COLUMNS, BUCKETS, DIM)
      shared = {(c, b): [value[c, b], optimizers.init(self.case, value[c, b])] for c, b in np.ndindex(COLUMNS, BUCKETS)}
      vectors |= {'shared': shared, 'bucket_of': bucket_of}
    pages = {'fused': self.known['fused'].directory.entry.shape[0]}
    waiting = {'fused': self.known['fused'].filter.entry.shape[0]} if 'counter' in spec.embedding.admission.name else {}
    columns = {'fused': layout.columns}
    self.expected = reference.Program(spec.embedding, columns, pages, waiting, {'fused': vectors})
    self.table = self.expected.tables['fused']

  def mask(self, found, lanes):
    """The program's, which must be one that the widths of the ids allow."""
    if self.program.spec.embedding.width.name == 'full':
      return 1.0
    mask = np.asarray(found[1])[:EXAMPLES].reshape(-1, DIM)
    most = self.program.spec.embedding.width.blocks
    for lane, id in enumerate(lanes):
      low, high = self.expected.widths['fused'].blocks(self.table.ids.known, id)
      blocks = int(mask[lane].sum()) * most // DIM
      assert low <= blocks <= high
      np.testing.assert_array_equal(mask[lane], np.arange(DIM) < blocks * DIM // most)
    return mask

  def evaluate(self, ids):
    lanes = self.expected.of_table('fused', ids)
    found, vectors = self.jit_evaluate(self.tables, self.known, self.program.axis.put(batch_of(ids)))
    assert found[0][:EXAMPLES].reshape(-1).tolist() == self.table.ids.find(lanes)
    self.same_vectors(vectors, self.table.vectors(lanes, self.mask(found, lanes)))

  def train(self, ids, gradient, step):
    lanes = self.expected.of_table('fused', ids)
    batch, shaped = self.program.axis.put((batch_of(ids), gradient.reshape(EXAMPLES, COLUMNS, DIM).astype(np.float32)))
    number = jnp.asarray(step, jnp.int32)
    self.tables, self.known, found, vectors = self.jit_train(self.tables, self.known, batch, shaped, number)
    rows, _ = self.expected.lookup(ids, step)['fused']
    assert found[0][:EXAMPLES].reshape(-1).tolist() == rows
    mask = self.mask(found, lanes)
    self.same_vectors(vectors, self.table.vectors(lanes, mask))
    self.table.update(lanes, gradient, mask)

  def same_vectors(self, found, expected):
    np.testing.assert_allclose(np.asarray(found)[:EXAMPLES].reshape(-1, DIM), expected, rtol=2e-3, atol=2e-4)

  def between_steps(self, steps):
    """What happens after so many steps."""
    short = {'fused': self.short()} if steps % EVICT_EVERY == 0 else None
    state = TrainState(jnp.asarray(steps, jnp.int32), {}, {}, (), self.tables, self.known)
    state = self.upkeep(state, steps)
    self.tables, self.known = state.tables, state.known
    self.expected.upkeep(steps, short)

  def short(self):
    """Ids with short vectors; where the vector is at the limit to a rounding error, as the program has it."""
    limit, value = self.program.spec.embedding.eviction.l2, np.asarray(self.tables['fused'].value, np.float64)
    out = set()
    for id, (row, _, _) in self.table.ids.known.items():
      length = self.table.length(id)
      at_limit = abs(length - limit) < 1e-3 * limit
      if (0.5 * np.sum(value[row] ** 2) if at_limit else length) < limit:
        out.add(id)
    return out

  def assert_same_ids(self):
    known = self.known['fused']
    assert_directory(known.directory, self.table.ids)
    if isinstance(self.table.admission, reference.Counter):
      assert_directory(known.filter, self.table.admission.waiting)
    counts = jax.device_get(known.counts)
    expected = self.expected.counts['fused']
    assert {name: int(getattr(counts, name).sum()) for name in expected} == expected


jit_entries = jax.jit(directories.entries)


def assert_directory(directory, expected):
  """Every id in its row, with its frequency and step; every other row is free."""
  (key, feature), frequency, version = jax.device_get(jit_entries(directory))
  alive = np.flatnonzero(frequency)
  columns = (key[alive, 0], key[alive, 1], feature[alive], alive, frequency[alive], version[alive])
  found = {(low, high, column): rest for low, high, column, *rest in zip(*(c.tolist() for c in columns), strict=True)}
  assert found == expected.known
  assert len(alive) == int(directory.used)


def full_run(number):
  """One in which tables fill and grow: more ids than there is room for, each of them again and again."""
  rng = np.random.default_rng(0)
  batches = [(rng.bytes(EXAMPLES * COLUMNS), EXAMPLES) for _ in range(8 * number)]
  return 256, 50, [batches[step % len(batches)] for step in range(42)]


FORMS = {'native': True, 'xla': False}
needs_compiler = pytest.mark.skipif(not build.load().ready, reason=build.load().note)


@pytest.mark.parametrize(('number', 'exchange'), [
  (1, 'gather'),
  *(pytest.param(n, exchange, marks=pytest.mark.slow) for n in (2, 4) for exchange in ('gather', 'all_to_all')),
])  # fmt: skip
@pytest.mark.parametrize(
  'form', [pytest.param('native', marks=needs_compiler), pytest.param('xla', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('name', [
  pytest.param(name, marks=() if name in ('dynamic_counter_old_width', 'adaptive_bloom_old') else pytest.mark.slow)
  for name in RUNS
])  # fmt: skip
def test_equals_plain_python(name, form, number, exchange):
  seen = dict.fromkeys(('steps', 'admitted', 'refused', 'unplaced', 'evicted', 'grown'), 0)

  @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
  @given(runs, st.integers(0, 1000))
  @example(full_run(number), 0)
  def check(run, seed):
    pair, rng = Pair(name, FORMS[form], number, exchange), np.random.default_rng(seed)
    for step in range(len(run[2])):
      ids = ids_of(run, step)
      pair.evaluate(ids)
      pair.train(ids, rng.normal(size=(EXAMPLES * COLUMNS, DIM)), step)
      pair.between_steps(step + 1)
      pair.assert_same_ids()
    for count in ('admitted', 'refused', 'unplaced', 'evicted'):
      seen[count] += pair.expected.counts['fused'][count]
    seen['grown'] += pair.expected.grown
    seen['steps'] += len(run[2])

  check()
  # That the runs came through all that they are to show.
  assert seen['steps'] > 100
  assert seen['admitted'] > 100
  assert seen['evicted'] > 10
  assert seen['unplaced'] > 0 or number > 1
  assert seen['grown'] > 0 or number > 1
  assert (seen['refused'] > 100) == ('always' not in name)
