"""Multi-hash tables against numpy: which rows, which vectors, which gradients; and whole runs with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from configs import base, multi_hash
from dlrm_jax import bits, inspect_checkpoint, train
from dlrm_jax import spec as specs
from dlrm_jax.checkpoint.same_model import CheckpointError
from dlrm_jax.embeddings.multi_hash import OPERATIONS, split_of
from dlrm_jax.program import make_program
from dlrm_jax.state import init_state
from dlrm_jax.step import jit_train_step
from dlrm_jax.structs import Batch
from tests.helpers import execute, result, small_command, small_spec
from tests.optim import reference
from tests.test_step import close, make_spec, value_of
from tests.test_train import STEPS, assert_same, state_of

DIM, LANES, RATE, L2 = 8, 24, 0.05, 0.01
# One id, few, fewer than FULL_BELOW, square and other numbers.
BUCKETS = (1, 2, 3, 5, 19, 20, 25, 26, 97, 1000, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 50, 100, 400)
FULL_BELOW = 20
OPTIONS = {
  case: {'optimizer__name': name, **{f'optimizer__{field}': value for field, value in fields.items()}}
  for case, (name, fields) in {
    'gradientdescent': ('gradientdescent', {}),
    'adagrad': ('adagrad', {}),
    'adagraddecay': ('adagraddecay', {'accumulator_decay_steps': 7, 'accumulator_decay_rate': 0.6}),
    'adam': ('adam', {}),
    'adamasync': ('adamasync', {}),
    'adamasync_rmsprop': ('adamasync', {'rmsprop': True}),
  }.items()
}


def spec_of(operation, **fields):
  """A spec of small tables."""
  defaults = {
    'embedding__kind': 'multi_hash', 'embedding__multi_hash__operation': operation, 'embedding__buckets': BUCKETS,
    'embedding__multi_hash__full_below': FULL_BELOW,
  }  # fmt: skip
  return make_spec(**defaults | fields)


def batch_of(seed, padding=5):
  """Ids that come often and seldom, the last of each column among them."""
  rng = np.random.default_rng(seed)
  weight = np.ones(LANES, np.float32)
  weight[LANES - padding :] = 0
  bucket = np.minimum((rng.random((LANES, 26)) ** 3 * BUCKETS).astype(np.uint32), np.array(BUCKETS, np.uint32) - 1)
  bucket[0] = np.array(BUCKETS) - 1
  return Batch(
    label=(rng.random(LANES) < 0.3).astype(np.float32),
    dense=rng.normal(size=(LANES, 13)).astype(np.float32),
    bucket=bucket,
    weight=weight,
  )


def rows_by_hand(operation, remainder_rows=0, buckets=BUCKETS, full_below=FULL_BELOW):
  """Of each column: rows of remainders, rows of quotients, and {id: (remainder, quotient)}, in plain Python."""
  made = []
  for number in buckets:
    m = remainder_rows or next(m for m in range(1, number + 1) if m * m >= number)
    pairs = {id: (id % m, id // m) for id in range(number)}
    if number < full_below or m + len({q for _, q in pairs.values()}) >= number:
      pairs = {id: (id, id if operation == 'concat' else 0) for id in range(number)}
      m = number
    made.append((m, max(q for _, q in pairs.values()) + 1, pairs))
  return made


class Reference:
  """The tables of a spec as one f64 array of remainders and one of quotients for each column, trained by numpy."""

  def __init__(self, operation, case, values, rate, update):
    self.operation, self.case, self.rate, self.update_how, self.steps = operation, case, rate, update, 0
    self.columns = rows_by_hand(operation)
    sizes = [size for size, _, _ in self.columns] + [size for _, size, _ in self.columns]
    assert sum(sizes) == len(values)
    self.tables = np.split(np.asarray(values, np.float64), np.cumsum(sizes)[:-1])
    self.slots = [reference.init(case, table) for table in self.tables]

  def parts(self, bucket):
    """Rows [2, B, 26] and their vectors [2, B, 26, P] of remainders and quotients."""
    rows = np.array([[self.columns[column][2][id] for column, id in enumerate(ids)] for ids in bucket.tolist()])
    rows = np.moveaxis(rows, -1, 0)
    find = lambda half: np.stack([self.tables[26 * half + c][rows[half, :, c]] for c in range(26)], axis=1)
    return rows, (find(0), find(1))

  def vectors(self, batch):
    _, (r, q) = self.parts(batch.bucket)
    vectors = {
      'add': lambda: r + q,
      'mul': lambda: r * (1 + q),
      'concat': lambda: np.concatenate([r, q], axis=-1),
    }[self.operation]()
    return vectors * batch.weight[:, None, None]

  def update(self, batch, gradient):
    rows, (r, q) = self.parts(batch.bucket)
    gradients = {
      'add': lambda: (gradient, gradient),
      'mul': lambda: (gradient * (1 + q), gradient * r),
      'concat': lambda: np.split(gradient, 2, axis=-1),
    }[self.operation]()
    self.steps += 1
    real = batch.weight > 0
    for i, (table, slots) in enumerate(zip(self.tables, self.slots, strict=True)):
      part, column = divmod(i, 26)
      row, grad = rows[part, real, column], gradients[part][real, column]
      if self.update_how == 'touched':
        table, slots = reference.step_rows(self.case, table, slots, self.steps, self.rate, row, grad, L2)
      else:
        total = np.zeros_like(table)
        np.add.at(total, row, grad)
        total[np.unique(row)] += L2 * table[np.unique(row)]
        table, slots = reference.step(self.case, table, total, slots, self.steps, self.rate)
      self.tables[i], self.slots[i] = table, slots


# Each operation and each optimizer; the optimizers do not see the operation.
@pytest.mark.parametrize(
  ('operation', 'case', 'update'),
  [
    *(('mul', case, 'touched') for case in reference.CASES),
    *((operation, case, 'touched') for operation in ('add', 'concat') for case in ('gradientdescent', 'adamasync')),
    ('concat', 'adam', 'all'),
  ],
)
def test_equals_numpy_over_several_steps(operation, case, update):
  # RMSProp's first steps are so long that, at RATE, half a unit of float32 in a gradient shows in the fourth digit.
  rate = RATE / 10 if case == 'adamasync_rmsprop' else RATE
  options = OPTIONS[case] | {'optimizer__learning_rate': rate, 'optimizer__table_update': update}
  held_against_numpy(operation, case, update, rounding=1e-4, **options)


def test_tables_of_half_the_memory_equal_numpy_to_rounding():
  table = held_against_numpy(
    'mul', 'gradientdescent', optimizer__name='gradientdescent', optimizer__learning_rate=RATE,
    embedding__dtype='bfloat16', rounding=0.03,
  )  # fmt: skip
  assert table.dtype == np.uint16


def held_against_numpy(operation, case, update='touched', *, rounding, **options):
  """The rows after nine steps, all of which numpy has done as well."""
  tables_of = make_program(spec_of(operation, embedding__l2=L2, **options)).embeddings

  @jax.jit
  def step(tables, batch, gradient, number):
    tables, _, found = tables_of.resolve(tables, {}, batch, number)
    return tables_of.lookup(tables, found), tables_of.update(tables, found, gradient, number)

  tables, known = tables_of.init()
  assert not known
  close_to = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding)
  expected = Reference(operation, case, bits.widen(tables['fused'].value), options['optimizer__learning_rate'], update)
  for number in range(9):
    batch, rng = batch_of(number, padding=number % 3), np.random.default_rng([number, 1])
    gradient = rng.normal(size=(LANES, 26, DIM))
    vectors, tables = step(tables, batch, jnp.asarray(gradient, jnp.float32), jnp.int32(number))
    close_to(vectors, expected.vectors(batch))
    expected.update(batch, gradient)
  close_to(bits.widen(tables['fused'].value), np.concatenate(expected.tables))
  return tables['fused'].value


def loss_by_hand(program, state, batch, operation, value):
  """The loss as a function of all rows of both parts, which autodiff goes through."""
  columns = rows_by_hand(operation)
  starts = np.cumsum([0, *(r for r, _, _ in columns), *(q for _, q, _ in columns)])
  pairs = np.array([[columns[column][2][id] for column, id in enumerate(ids)] for ids in batch.bucket.tolist()])
  r, q = (value[pairs[:, :, part] + starts[26 * part :][:26]] for part in (0, 1))
  vectors = jnp.concatenate([r, q], axis=2) if operation == 'concat' else {'add': r + q, 'mul': r + r * q}[operation]
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  logit, _ = program.model.apply(variables, batch.dense, vectors, batch.weight, True, mutable=['batch_stats'])
  return ((jax.nn.softplus(logit) - batch.label * logit) * batch.weight).sum() / batch.weight.sum()


@pytest.mark.parametrize('operation', sorted(OPERATIONS))
def test_gradients_are_those_of_autodiff_through_both_tables(operation):
  program = make_program(spec_of(operation, optimizer__name='gradientdescent', optimizer__learning_rate=1.0))
  state, batch = init_state(program), jax.tree.map(jnp.asarray, batch_of(0))
  before = np.asarray(state.tables['fused'].value)
  gradient = jax.grad(lambda value: loss_by_hand(program, state, batch, operation, value))(jnp.asarray(before))
  assert np.abs(gradient).max() > 1e-3
  state, metrics = jit_train_step(program)(state, batch)
  np.testing.assert_allclose(state.tables['fused'].value, before - np.asarray(gradient), atol=1e-6)
  assert np.isfinite(metrics['loss'])


@settings(max_examples=200, deadline=None)
@given(
  buckets=st.integers(1, 3000), remainder_rows=st.sampled_from([0, 1, 2, 4, 50, 10**6]),
  full_below=st.sampled_from([0, 200]), operation=st.sampled_from(sorted(OPERATIONS)),
)  # fmt: skip
def test_no_two_ids_of_a_column_share_both_rows(buckets, remainder_rows, full_below, operation):
  fields = {'remainder_rows': remainder_rows, 'full_below': full_below}
  spec = spec_of(
    operation, embedding__buckets=(buckets,),
    **{f'embedding__multi_hash__{name}': value for name, value in fields.items()},
  ).embedding  # fmt: skip
  split = split_of(buckets, spec)
  ((remainders, quotients, pairs),) = rows_by_hand(operation, buckets=(buckets,), **fields)
  assert {id: (id % split.modulus, id // split.divisor) for id in range(buckets)} == pairs
  assert len(set(pairs.values())) == buckets
  assert {row for row, _ in pairs.values()} == set(range(remainders))
  assert {row for _, row in pairs.values()} == set(range(quotients))


def test_without_a_number_the_rows_are_as_few_as_can_be():
  spec = spec_of('add', embedding__multi_hash__full_below=0).embedding
  for buckets in range(6, 1500):
    modulus, divisor = split_of(buckets, spec)
    assert modulus == divisor
    assert modulus + -(-buckets // modulus) == min(m + -(-buckets // m) for m in range(1, buckets + 1))


@pytest.mark.parametrize('operation', sorted(OPERATIONS))
def test_memory_is_that_of_the_rows_that_were_computed(operation):
  sizes = rows_by_hand(operation)
  remainders, quotients = ([size[part] for size in sizes] for part in (0, 1))
  fused = jax.eval_shape(lambda: init_state(make_program(spec_of(operation)))).tables
  single = jax.eval_shape(lambda: init_state(make_program(spec_of(operation, embedding__fusion=False)))).tables
  width = DIM // 2 if operation == 'concat' else DIM
  for leaf in (fused['fused'].value, fused['fused'].slots.m):
    assert leaf.shape == (sum(remainders + quotients), width)
  assert [single[f'C{n + 1}'].value.shape for n in range(52)] == [(size, width) for size in remainders + quotients]


def test_the_experiment_has_the_rows_that_it_says():
  spec = specs.from_config(multi_hash.get_config())
  state = jax.eval_shape(lambda: init_state(make_program(spec)))
  rows = state.tables['fused'].value.shape[0]
  options = spec.embedding.multi_hash
  by_hand = rows_by_hand(options.operation, options.remainder_rows, (1000, 100, 20, 250_000), options.full_below)
  assert [row[:2] for row in by_hand] == [(32, 32), (100, 1), (20, 1), (500, 500)]
  assert f'{round(rows, -3):,}' in multi_hash.__doc__
  assert rows < sum(base.BUCKETS) / 500


def run(steps=3, padding=5, **fields):
  """(state on the host, losses) after some steps."""
  program = make_program(spec_of(**fields))
  state, step, losses = init_state(program), jit_train_step(program), []
  for i in range(steps):
    state, metrics = step(state, batch_of(i, padding))
    losses.append(float(metrics['loss']))
  return jax.device_get(state), losses


@pytest.mark.slow
def test_one_table_or_52_give_the_same_bits():
  fused, losses = run(operation='mul', optimizer__name='adagraddecay')
  single, single_losses = run(operation='mul', optimizer__name='adagraddecay', embedding__fusion=False)
  assert (len(fused.tables), len(single.tables)) == (1, 52)
  assert losses == single_losses
  np.testing.assert_array_equal(value_of(fused), value_of(single))
  close(fused.params, single.params, atol=0)


@pytest.mark.parametrize('operation', sorted(OPERATIONS))
def test_only_rows_of_the_batch_move_and_padding_touches_nothing(operation):
  before = value_of(run(0, operation=operation)[0])
  after = value_of(run(1, operation=operation, padding=10)[0])
  columns = rows_by_hand(operation)
  starts = np.cumsum([0, *(r for r, _, _ in columns), *(q for _, q, _ in columns)])
  rows = {
    int(starts[26 * part + column]) + columns[column][2][id][part]
    for ids in batch_of(0).bucket[: LANES - 10].tolist() for column, id in enumerate(ids) for part in (0, 1)
  }  # fmt: skip
  assert np.flatnonzero((before != after).any(axis=1)).tolist() == sorted(rows)
  nothing = value_of(run(1, operation=operation, padding=LANES)[0])
  np.testing.assert_array_equal(nothing, before)


@pytest.mark.parametrize('operation', sorted(OPERATIONS))
def test_first_vectors_spread_about_as_those_of_static_tables(operation):
  spec = spec_of(operation, embedding__buckets=(4000,))
  tables_of = make_program(spec).embeddings
  tables, _ = tables_of.init()
  everything = Batch(
    label=jnp.zeros(4000), dense=jnp.zeros((4000, 13)), weight=jnp.ones(4000),
    bucket=jnp.repeat(jnp.arange(4000, dtype=jnp.uint32)[:, None], 26, axis=1),
  )  # fmt: skip
  vectors = np.asarray(tables_of.lookup(tables, tables_of.find({}, everything)))
  static = 0.8796 / np.sqrt(DIM)  # of a normal cut at two deviations
  spread = {'add': 2**0.5, 'mul': (1 + static**2) ** 0.5, 'concat': 2**0.5}[operation]
  assert vectors.std() == pytest.approx(static * spread, rel=0.05)
  assert np.abs(vectors.mean()) < 0.02
  # Remainders and quotients are drawn apart: ids that have each other's numbers do not begin alike.
  for column in (0, 25):
    assert len(np.unique(vectors[:, column].round(5), axis=0)) == 4000


@pytest.mark.slow
def test_a_step_takes_over_the_tables_and_needs_no_memory_of_their_size():
  fields = {'embedding__buckets': (40_000,), 'embedding__multi_hash__remainder_rows': 4}
  program = make_program(spec_of('mul', **fields))
  state = init_state(program)
  table = state.tables['fused'].value.nbytes
  assert table > 26 * 10_000 * DIM * 2
  memory = jit_train_step(program).lower(state, batch_of(0)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < table / 5
  assert memory.alias_size_in_bytes > 3 * table


# Whole runs, with 50 buckets in each column.
FIELDS = {'embedding__kind': 'multi_hash', 'embedding__multi_hash__full_below': 0}


def trained(capsys, spec):
  train.run(spec)
  (line,) = capsys.readouterr().out.splitlines()
  return json.loads(line)


def test_the_command_line_trains_and_evaluates(criteo, tmp_path, repository):
  fields = FIELDS | {'epochs': 3, 'embedding__multi_hash__operation': 'concat'}
  code, out, err = execute(small_command(criteo, tmp_path, **fields), repository)
  assert code == 0, err
  assert result(out)['step'] == 3 * STEPS
  assert result(out)['auc'] > 0.8
  assert f'1 table(s), {26 * (8 + 7)} rows' in err


@pytest.mark.slow
def test_stopped_and_resumed_gives_the_bits_of_an_unstopped_run(criteo, tmp_path, capsys):
  fields = FIELDS | {'no_eval': True}
  trained(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), steps=22, **fields))
  for steps in (1, STEPS, 22):
    trained(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'b'), steps=steps, **fields))
  assert_same(state_of(tmp_path / 'a', 22), state_of(tmp_path / 'b', 22))


def test_a_checkpoint_of_another_split_is_one_clear_line(criteo, tmp_path, capsys):
  fields = FIELDS | {'checkpoint': str(tmp_path / 'a'), 'no_eval': True, 'steps': 2}
  trained(capsys, small_spec(criteo, tmp_path, **fields))
  for name, value in (('operation', 'add'), ('remainder_rows', 9), ('full_below', 51)):
    with pytest.raises(CheckpointError, match=rf'config\.embedding\.multi_hash\.{name} is .* there and {value} here'):
      train.run(small_spec(criteo, tmp_path, **fields | {f'embedding__multi_hash__{name}': value}))
  with pytest.raises(CheckpointError, match=r'config\.embedding\.kind is multi_hash there and static here'):
    train.run(small_spec(criteo, tmp_path, **fields | {'embedding__kind': 'static'}))


@pytest.mark.parametrize('fusion', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_inspector_tells_of_both_parts(criteo, tmp_path, capsys, fusion):
  fields = FIELDS | {'embedding__multi_hash__operation': 'concat', 'embedding__fusion': fusion, 'no_eval': True}
  trained(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), steps=1, **fields))
  values = [table['value'] for _, table in sorted(state_of(tmp_path / 'a', 1)['tables'].items(), key=place_of)]
  path = tmp_path / 'rows.parquet'
  assert inspect_checkpoint.main([str(tmp_path / 'a'), '--json', '--parquet', str(path)]) == 0
  found = json.loads(capsys.readouterr().out)['static']
  rows = {f'C{c + 1} {part}': number for part, number in (('remainder', 8), ('quotient', 7)) for c in range(26)}
  assert {name: of['rows'] for name, of in found.items()} == rows
  table = parquet.read_table(path)
  assert table['column'].to_pylist() == [name for name, number in rows.items() for _ in range(number)]
  np.testing.assert_array_equal(np.array(table['vector'].to_pylist(), np.float32), np.concatenate(values))
  assert inspect_checkpoint.main([str(tmp_path / 'a'), '--json', '--feature', 'C3']) == 0
  assert list(json.loads(capsys.readouterr().out)['static']) == ['C3 remainder', 'C3 quotient']


def place_of(table):
  name = table[0]
  return 0 if name == 'fused' else int(name[1:])


@pytest.mark.slow
def test_static_tables_do_not_ask_for_the_split_of_others(criteo, tmp_path, capsys):
  fields = {'checkpoint': str(tmp_path / 'a'), 'no_eval': True}
  trained(capsys, small_spec(criteo, tmp_path, steps=2, **fields))
  again = trained(capsys, small_spec(criteo, tmp_path, steps=3, embedding__multi_hash__operation='add', **fields))
  assert again['step'] == 3
