"""The row kernels in C++ against those in XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.embeddings.update import update_rows
from dlrm_jax.native import build
from dlrm_jax.native.rows import NATIVE, XLA
from dlrm_jax.optim.rowwise import CHUNK, init_slots
from dlrm_jax.program import make_program
from dlrm_jax.state import init_state
from dlrm_jax.step import jit_train_step
from dlrm_jax.structs import Table
from tests.helpers import outputs_on_threads
from tests.native.trees import merge_sum
from tests.optim import reference
from tests.test_step import make_batch, make_spec

pytestmark = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
ROWS = 9
numbers = st.sampled_from([*range(ROWS), *range(4), ROWS, ROWS + 5, 2**31 - 1, -1, -(2**31)])


def tables(rows, seed=0):
  """Of rows of 64, 12 and 4 bytes: one the kernels know the size of, one they do not, and a counter."""
  rng = np.random.default_rng(seed)
  floats = [jnp.asarray(rng.normal(size=(rows, width)), jnp.float32) for width in (16, 3)]
  return {'value': floats[0], 'odd': floats[1], 'count': jnp.asarray(rng.integers(0, 9, (rows, 1)), jnp.int32)}


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@given(row=st.lists(numbers, max_size=70), columns=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_read(row, columns):
  row = jnp.array(row[: len(row) // columns * columns], jnp.int32).reshape(-1, columns)
  same(NATIVE.read(tables(ROWS), row), XLA.read(tables(ROWS), row))


@given(row=st.lists(numbers, max_size=70, unique=True))
@settings(max_examples=50, deadline=None)
def test_write(row):
  row, new = jnp.array(row, jnp.int32), tables(len(row), seed=1)
  same(NATIVE.write(tables(ROWS), row, new), XLA.write(tables(ROWS), row, new))


@pytest.mark.parametrize('lanes', [1, 1023, 2048, 50_001])
def test_read_and_write_on_several_threads(lanes):
  rows = 60_000
  row = np.random.default_rng(2).permutation(rows + 500)[:lanes]
  row = jnp.asarray(row, jnp.int32)
  same(NATIVE.read(tables(rows), row), XLA.read(tables(rows), row))
  new = tables(lanes, seed=3)
  same(NATIVE.write(tables(rows), row, new), XLA.write(tables(rows), row, new))


def merged(kernels, scratch, row, grad, places, leaf=None):
  """{row: bits of the sum of its gradients}, after what `merge` promises of the other lanes was checked."""
  merge = jax.jit(kernels.merge, static_argnums=(3, 4))
  _, distinct, total, count = merge(jnp.array(scratch), row, grad, places, leaf or max(len(row), 1))
  distinct, total, count = np.asarray(distinct), np.asarray(total), int(count)
  assert distinct.shape == (places,)
  assert (distinct[count:] == len(scratch)).all()
  assert len(set(distinct[:count])) == count
  return {int(number): sums.tobytes() for number, sums in zip(distinct[:count], total[:count], strict=True)}


@given(row=st.lists(numbers, max_size=70), more=st.integers(0, 5), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_merge(row, more, seed):
  rng = np.random.default_rng(seed)
  grad = rng.normal(size=(len(row), 3)).astype(np.float32)
  # Garbage that is often a lane number.
  arguments = rng.integers(-1, 20, ROWS, dtype=np.int32), np.array(row, np.int32), grad, len(row) + more
  assert merged(NATIVE, *arguments) == merged(XLA, *arguments)


@pytest.mark.parametrize('dim', [1, 16])
@pytest.mark.parametrize('lanes', [CHUNK - 1, CHUNK, CHUNK + 1, 60_000])
def test_merge_on_several_threads(lanes, dim):
  rng = np.random.default_rng(lanes)
  row = (rng.zipf(1.2, lanes) % 30_000 - 5).astype(np.int32)
  arguments = rng.integers(0, lanes, 29_000, dtype=np.int32), row, rng.normal(size=(lanes, dim)).astype(np.float32)
  assert merged(NATIVE, *arguments, lanes) == merged(XLA, *arguments, lanes)


@pytest.mark.parametrize('leaf', [1, 40, 416, 3328, 30_000])
@pytest.mark.parametrize('lanes', [2_000, 13_312, 29_999])
def test_merge_leaf_by_leaf(lanes, leaf):
  rng = np.random.default_rng(lanes)
  row = (rng.zipf(1.2, lanes) % 500 - 5).astype(np.int32)
  grad = rng.normal(size=(lanes, 16)).astype(np.float32)
  found = merged(NATIVE, np.zeros(480, np.int32), row, grad, lanes, leaf)
  inside = (row >= 0) & (row < 480)
  sums = merge_sum(np.where(inside, row, 480), grad, 480, leaf)
  assert found == {int(one): sums[one].tobytes() for one in set(row[inside])}


def check_update(tx, lanes, dim, cancels=False):
  rng = np.random.default_rng(lanes)
  value = jnp.asarray(rng.normal(size=(5_000, dim)), jnp.float32)
  steps = [jax.jit(functools.partial(update_rows, tx, kernels=kernels)) for kernels in (XLA, NATIVE)]
  found = [Table(value, init_slots(tx, value), jnp.zeros(5_000, jnp.int32)) for _ in steps]
  for _ in range(3):
    row = (rng.zipf(1.3, lanes) % 5_500 - 3).astype(np.int32)
    grad = jnp.asarray(rng.normal(size=(lanes, dim)), jnp.float32)
    found = [step(table, row, grad, 0.1) for step, table in zip(steps, found, strict=True)]
  def close(a, b):
    # RMSProp's first steps are 32 learning rates: what is left of large numbers has the rounding of those.
    np.testing.assert_allclose(a, b, rtol=2e-7, atol=3e-7 * np.abs(b).max() if cancels else 2e-7)

  jax.tree.map(close, *((table.value, table.slots) for table in found))


@pytest.mark.parametrize('lanes', [0, 1, CHUNK, CHUNK + 1, 9_000])
@pytest.mark.parametrize('case', reference.CASES)
def test_update_rows(case, lanes):
  check_update(reference.make(case, 0.05), lanes, dim=16, cancels=case == 'adamasync_rmsprop')


@pytest.mark.parametrize('dim', [1, 8, 20])
@pytest.mark.parametrize('case', reference.CASES)
def test_update_rows_of_other_widths(case, dim):
  check_update(reference.make(case, 0.05), 3_000, dim, cancels=case == 'adamasync_rmsprop')


def test_update_rows_by_what_no_kernel_knows():
  check_update(optax.rmsprop(0.05, momentum=0.9), 3_000, dim=16, cancels=True)


@pytest.mark.parametrize('case', reference.CASES)
def test_update_rows_by_a_schedule(case):
  tx = reference.make(case, lambda count: 0.05 / (1 + count))
  check_update(tx, 3_000, dim=16, cancels=case == 'adamasync_rmsprop')


@pytest.mark.parametrize('case', reference.CASES)
def test_tables_are_updated_in_place(case):
  """On a donated table: everything is aliased, and the temporary memory has not even a byte per row."""
  rows = 5_000_000
  tx = reference.make(case, 0.1)
  value = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
  slots = jax.eval_shape(functools.partial(init_slots, tx), value)
  table = Table(value=value, slots=slots, scratch=jax.ShapeDtypeStruct((rows,), jnp.int32))

  def step(table, row):
    return update_rows(tx, table, row, jnp.sin(NATIVE.read(table.value, row)), kernels=NATIVE)

  step = jax.jit(step, donate_argnums=0)
  memory = step.lower(table, jax.ShapeDtypeStruct((3 * CHUNK,), jnp.int32)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < rows
  assert memory.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(table))


STEPS = [(name, True) for name in ('adam', 'adamasync', 'adagraddecay', 'adagrad', 'gradientdescent')]


@pytest.mark.parametrize(('optimizer', 'fusion'), [
  pytest.param(*step, marks=() if step in (('adagraddecay', True), ('adam', True)) else pytest.mark.slow)
  for step in [*STEPS, ('adagraddecay', False)]
])  # fmt: skip
def test_a_training_step(optimizer, fusion):
  """The tables alone: the layers of the network, too, are other kernels."""
  found = []
  for native in (True, False):
    program = make_program(make_spec(optimizer__name=optimizer, embedding__fusion=fusion, native=native))
    program = dataclasses.replace(program, model=make_program(make_spec(native=False)).model)
    state, step = init_state(program), jit_train_step(program)
    for i in range(3):
      state, _ = step(state, make_batch(i, padding=5))
    found.append(jax.tree.map(np.asarray, {name: (t.value, t.slots) for name, t in state.tables.items()}))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)


MANY_LANES = """
import hashlib, jax, numpy as np
from dlrm_jax.native import build
from dlrm_jax.native.rows import NATIVE
from dlrm_jax.optim import OPTIMIZERS
from dlrm_jax.embeddings.update import update_rows
from dlrm_jax.optim.rowwise import init_slots
from dlrm_jax.structs import Table
assert build.load().ready
rng = np.random.default_rng(0)
row, grad = rng.integers(0, 5000, 70_000, dtype=np.int32), rng.normal(size=(70_000, 16)).astype(np.float32)
_, *parts = jax.jit(NATIVE.merge, static_argnums=(3, 4))(np.zeros(5000, np.int32), row, grad, 70_000, 3328)
count = int(parts[2])
tx, value = OPTIMIZERS['adamasync'](0.1), np.ones((5000, 16), np.float32)
update = jax.jit(lambda table: update_rows(tx, table, row, grad, 0.1, NATIVE, leaf=3328))
table = update(Table(value, init_slots(tx, value), np.zeros(5000, np.int32)))
arrays = parts[0], parts[1][:count], table.value, table.slots.m, table.slots.v
print(hashlib.sha256(b''.join(np.asarray(array).tobytes() for array in arrays)).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit(repository):
  assert len(set(outputs_on_threads(MANY_LANES, repository, 1, 2, 5))) == 1
