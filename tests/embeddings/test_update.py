import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.embeddings.update import UPDATES, update_all, update_rows
from dlrm_jax.optim.rowwise import init_slots
from dlrm_jax.structs import Table
from tests.optim import reference

ROWS, D, LANES, LR = 8, 3, 12, 0.05


def make_table(tx, value, seed=0):
  """A table whose scratch is full of garbage, which must not matter."""
  garbage = np.random.default_rng(seed).integers(-(2**31), 2**31, len(value), dtype=np.int32)
  value = jnp.asarray(value, jnp.float32)
  return Table(value=value, slots=init_slots(tx, value), scratch=jnp.asarray(garbage))


@functools.cache
def jit_update(case, how):
  return jax.jit(functools.partial(UPDATES[how], reference.make(case, LR)), donate_argnums=0)


def f32(x):
  return jnp.asarray(x, jnp.float32)


# Every kind of lane: duplicates, rows past the end and negative ones, both "no row".
steps_of_rows = st.lists(
  st.lists(st.sampled_from([*range(ROWS), *range(4), ROWS, ROWS + 5, 2**31 - 1, -1]), min_size=LANES, max_size=LANES),
  min_size=1,
  max_size=4,
)


@pytest.mark.parametrize('case', reference.CASES)
@given(steps=steps_of_rows, seed=st.integers(0, 100), l2=st.sampled_from([0.0, 0.1]))
@settings(max_examples=30, deadline=None)
def test_update_rows_equals_numpy(case, steps, seed, l2):
  rng = np.random.default_rng(seed)
  expected = rng.normal(size=(ROWS, D))
  state = reference.init(case, expected)
  table = make_table(reference.make(case, LR), expected, seed)
  for t, rows in enumerate(steps, 1):
    row, grad = np.asarray(rows, np.int32), rng.normal(size=(LANES, D))
    expected, state = reference.step_rows(case, expected, state, t, LR, row, grad, l2)
    table = jit_update(case, 'touched')(table, row, f32(grad), l2)
  np.testing.assert_allclose(table.value, expected, rtol=1e-4, atol=1e-4)
  reference.assert_state(table.slots, state, 1e-4)
  assert table.slots.count == len(steps)


@pytest.mark.parametrize('case', reference.CASES)
def test_many_rows_equal_numpy(case):
  rng = np.random.default_rng(0)
  rows, lanes = 20_000, 9_000
  expected = rng.normal(size=(rows, D))
  state = reference.init(case, expected)
  table = make_table(reference.make(case, LR), expected)
  for t in (1, 2, 3):
    row = np.where(rng.random(lanes) < 0.2, 7, rng.integers(0, rows + 500, lanes)).astype(np.int32)
    grad = rng.normal(size=(lanes, D))
    expected, state = reference.step_rows(case, expected, state, t, LR, row, grad, 0.1)
    table = jit_update(case, 'touched')(table, row, f32(grad), 0.1)
  np.testing.assert_allclose(table.value, expected, rtol=2e-4, atol=2e-4)
  reference.assert_state(table.slots, state, 1e-3)


@pytest.mark.parametrize('case', ['gradientdescent', 'adagrad'])
@pytest.mark.parametrize('how', sorted(UPDATES))
def test_equals_the_dense_optimizer_where_a_zero_gradient_changes_nothing(case, how):
  rng = np.random.default_rng(2)
  tx = reference.make(case, LR)
  table = make_table(tx, rng.normal(size=(ROWS, D)))
  value, state = jnp.array(table.value), tx.init(table.value)
  dense_update = jax.jit(tx.update)
  for _ in range(5):
    row, grad = rng.integers(0, ROWS, LANES), f32(rng.normal(size=(LANES, D)))
    updates, state = dense_update(jnp.zeros_like(value).at[row].add(grad), state, value)
    value = optax.apply_updates(value, updates)
    table = jit_update(case, how)(table, jnp.asarray(row, jnp.int32), grad, 0.0)
  np.testing.assert_allclose(table.value, value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'tx',
  [*(reference.make(case, LR) for case in reference.CASES), optax.sgd(LR, momentum=0.9), optax.adam(LR)],
  ids=[*reference.CASES, 'optax.sgd with momentum', 'optax.adam'],
)
def test_equals_the_dense_optimizer_when_every_row_is_touched(tx):
  rng = np.random.default_rng(3)
  table = make_table(tx, rng.normal(size=(ROWS, D)))
  value, state = table.value, tx.init(table.value)
  update, dense_update = jax.jit(functools.partial(update_rows, tx)), jax.jit(tx.update)
  for _ in range(5):
    row = rng.permutation([*range(ROWS), 0, 0, 1, 5]).astype(np.int32)
    grad = f32(rng.normal(size=(LANES, D)))
    updates, state = dense_update(jnp.zeros_like(value).at[row].add(grad), state, value)
    value = optax.apply_updates(value, updates)
    table = update(table, jnp.asarray(row), grad)
  np.testing.assert_allclose(table.value, value, rtol=1e-5, atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), table.slots, state)


@pytest.mark.parametrize('case', reference.CASES)
def test_update_all_is_the_dense_optimizer_bit_for_bit(case):
  rng = np.random.default_rng(4)
  tx = reference.make(case, LR)
  table = make_table(tx, rng.normal(size=(ROWS, D)))
  value, state = table.value, tx.init(table.value)
  for _ in range(5):
    row, grad = rng.integers(0, ROWS + 2, LANES).astype(np.int32), f32(rng.normal(size=(LANES, D)))
    updates, state = tx.update(jnp.zeros_like(value).at[row].add(grad, mode='drop'), state, value)
    value = optax.apply_updates(value, updates)
    table = update_all(tx, table, jnp.asarray(row), grad)
  np.testing.assert_array_equal(table.value, value)
  jax.tree.map(np.testing.assert_array_equal, table.slots, state)


@pytest.mark.parametrize('how', sorted(UPDATES))
def test_l2_acts_once_on_touched_rows_only(how):
  table = make_table(reference.make('gradientdescent', LR), np.ones((ROWS, D)))
  row = jnp.full(LANES, ROWS, jnp.int32).at[:3].set(2)
  table = jit_update('gradientdescent', how)(table, row, jnp.zeros((LANES, D)), 0.5)
  expected = np.ones((ROWS, D))
  expected[2] -= LR * 0.5
  np.testing.assert_allclose(table.value, expected, rtol=1e-6)


@pytest.mark.parametrize('case', reference.CASES)
def test_no_row_at_all_changes_nothing_but_the_shared_slots(case):
  before = make_table(reference.make(case, LR), np.random.default_rng(5).normal(size=(ROWS, D)))
  kept = [np.array(leaf) for leaf in jax.tree.leaves((before.value, before.slots))]
  after = jit_update(case, 'touched')(before, jnp.full(LANES, ROWS, jnp.int32), jnp.ones((LANES, D)), 0.1)
  for old, new in zip(kept, jax.tree.leaves((after.value, after.slots)), strict=True):
    np.testing.assert_array_equal(new, old if old.ndim else old + 1)


def test_the_scratch_does_not_matter_and_lanes_are_added_in_order():
  rng = np.random.default_rng(6)
  row, grad = rng.integers(0, ROWS, LANES).astype(np.int32), f32(rng.normal(size=(LANES, D)))
  tx = reference.make('adam', LR)
  update = jit_update('adam', 'touched')
  tables = [update(make_table(tx, np.ones((ROWS, D)), seed), row, grad, 0.0) for seed in range(3)]
  for table in tables[1:]:
    np.testing.assert_array_equal(table.value, tables[0].value)


@pytest.mark.parametrize('case', reference.CASES)
def test_lookup_and_update_touch_only_the_rows_of_the_batch(case):
  """On a donated table: everything is aliased, and the temporary memory has not even a byte per row."""
  rows, lanes = 5_000_000, 512
  tx = reference.make(case, LR)
  value = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
  slots = jax.eval_shape(functools.partial(init_slots, tx), value)
  scratch = jax.ShapeDtypeStruct((rows,), jnp.int32)

  def step(value, slots, scratch, row):
    table = Table(value=value, slots=slots, scratch=scratch)
    vectors = value.at[row].get(mode='fill', fill_value=0)
    return update_rows(tx, table, row, jax.grad(lambda x: jnp.sum(jnp.sin(x)))(vectors), l2=0.1)

  row = jax.ShapeDtypeStruct((lanes,), jnp.int32)
  step = jax.jit(step, donate_argnums=(0, 1, 2))
  memory = step.lower(value, slots, scratch, row).compile().memory_analysis()
  assert memory.temp_size_in_bytes < rows
  assert memory.alias_size_in_bytes >= sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((value, slots, scratch))
  )
