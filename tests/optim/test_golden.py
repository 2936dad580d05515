"""The worked examples of the optimizers' source programs: learning rate 0.1, printed to nine decimals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlrm_jax.embeddings.update import update_all, update_rows
from dlrm_jax.optim import OPTIMIZERS
from dlrm_jax.optim.rowwise import init_slots
from dlrm_jax.structs import Table

PRECISIONS = {'float64': 1e-9, 'float32': 1e-6}
DECAY = {'decay_steps': 2, 'decay_rate': 0.9}

GRADS = [(0.1, -0.2), (0.3, 0.1), (-0.2, 0.4)]
ADAM = [(0.900000316, -1.900000158), (0.808222296, -1.873366492), (0.782431937, -1.919099639)]
ADAM_STATE = {'m': (0.0151, 0.0328), 'v': (1.3989001e-4, 2.0991004e-4), 'count': 3}
DENSE = {
  'gradientdescent': ({}, [(0.99, -1.98), (0.96, -1.99), (0.98, -2.03)], {}),
  'adagrad': (
    {},
    [(0.969848866, -1.946547752), (0.902766826, -1.972367641), (0.943591655, -2.044209761)],
    {'a': (0.24, 0.31)},
  ),
  'adam': ({}, ADAM, ADAM_STATE),
  'adamasync': ({}, ADAM, ADAM_STATE),
  'adagraddecay': (
    DECAY,
    [(0.969848866, -1.946547752), (0.901024145, -1.973664059), (0.942727028, -2.047185521)],
    {'a': (0.23, 0.296), 'q': 1},
  ),
}


@pytest.fixture(params=PRECISIONS)
def precision(request):
  """(dtype, tolerance), with 64-bit JAX where the dtype needs it."""
  with jax.enable_x64(request.param == 'float64'):
    yield jnp.dtype(request.param), PRECISIONS[request.param]


def close(found, expected, tolerance):
  found = np.asarray(found)
  np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=0, atol=tolerance)


def train(name, options, steps, dtype, update=update_rows, rows=3):
  """The tables after each step; a step is {row: gradient}."""
  tx = OPTIMIZERS[name](0.1, **options)
  value = jnp.asarray([(1, -2), (0.5, 0.5), (0, 0)][:rows], dtype)
  table = Table(value=value, slots=init_slots(tx, value), scratch=jnp.zeros(rows, jnp.int32))
  tables, step = [], jax.jit(functools.partial(update, tx))
  for grads in steps:
    lanes = {rows: (9, 9), **grads} if len(grads) == 1 else grads  # "no row", so that all steps have two lanes
    table = step(table, jnp.asarray(list(lanes), jnp.int32), jnp.asarray(list(lanes.values()), dtype))
    assert all(leaf.dtype in (dtype, jnp.int32) for leaf in jax.tree.leaves(table))
    tables.append(table)
  return tables


@pytest.mark.parametrize('name', DENSE)
def test_dense(name, precision):
  dtype, tolerance = precision
  options, path, expected = DENSE[name]
  tx = OPTIMIZERS[name](0.1, **options)
  w = jnp.asarray([1, -2], dtype)
  state = tx.init(w)
  for g, after in zip(GRADS, path, strict=True):
    updates, state = tx.update(jnp.asarray(g, dtype), state, w)
    w = optax.apply_updates(w, updates)
    assert w.dtype == dtype
    close(w, after, tolerance)
  for slot, value in expected.items():
    close(getattr(state, slot), value, tolerance)


SPARSE_STEPS = [{0: (0.1, -0.2), 1: (0.5, 0.5)}, {0: (0.3, 0.1)}, {0: (-0.2, 0.4), 2: (1, -1)}]
LAZY_ADAM = ((0.400000063,) * 2, (-0.06388134, 0.06388134), {'m': 0.05, 'v': 2.5e-4})
SPARSE = {  # rows 1 and 2 after the last step, and slots of row 1
  'gradientdescent': ((0.45, 0.45), (-0.1, 0.1), {}),
  'adagrad': ((0.415484575,) * 2, (-0.095346259, 0.095346259), {'a': 0.35}),
  'adam': LAZY_ADAM,
  'adamasync': LAZY_ADAM,
}


@pytest.mark.parametrize('name', SPARSE)
def test_sparse(name, precision):
  dtype, tolerance = precision
  row1, row2, slots1 = SPARSE[name]
  tables = train(name, {}, SPARSE_STEPS, dtype)
  for table, after in zip(tables, DENSE[name][1], strict=True):
    close(table.value[0], after, tolerance)
  close(tables[-1].value[1], row1, tolerance)
  close(tables[-1].value[2], row2, tolerance)
  for slot, value in slots1.items():
    close(getattr(tables[-1].slots, slot)[1], value, tolerance)
  if name == 'adagrad':
    close(tables[-1].slots.a[2], 1.1, tolerance)


def test_adam_that_sweeps_moves_untouched_rows(precision):
  dtype, tolerance = precision
  tables = train('adam', {}, SPARSE_STEPS, dtype, update=update_all)
  for table, row0, row1 in zip(tables, ADAM, [0.400000063, 0.33299428, 0.281198616], strict=True):
    close(table.value[0], row0, tolerance)
    close(table.value[1], row1, tolerance)
  close(tables[-1].value[2], (-0.06388134, 0.06388134), tolerance)
  close(tables[-1].slots.m[1], 0.0405, tolerance)
  close(tables[-1].slots.v[1], 2.49500e-4, 1e-6)  # printed to four digits


def test_adamasync_rmsprop(precision):
  dtype, tolerance = precision
  tables = train('adamasync', {'rmsprop': True}, SPARSE_STEPS, dtype)
  path = [(-2.160697706, 1.16188245), (-8.005325642, 2.592938637), (-11.57457833, 1.120101316)]
  for table, after in zip(tables, path, strict=True):
    close(table.value[0], after, tolerance * 10)  # numbers ten times as large, printed with as many digits
  close(tables[-1].value[1], -2.662214417, tolerance * 10)
  close(tables[-1].value[2], (-3.162261849, 3.162261849), tolerance * 10)


def test_adagraddecay_catches_up_once_a_touch(precision):
  dtype, tolerance = precision
  touched = [(0, 1), (0,), (0,), (0,), (0, 1), (1,)]
  tables = train('adagraddecay', DECAY, [{row: (1, 2) for row in rows} for rows in touched], dtype, rows=2)
  a0 = [(1.1, 4.1), (1.99, 7.69), (2.99, 11.69), (3.691, 14.521), (4.691, 18.521)]
  for table, a, q in zip(tables, a0, [0, 1, 1, 2, 2], strict=False):
    close(table.slots.a[0], a, tolerance * 10)
    close(table.slots.q[0], q, 0)
  row1 = {
    1: ((0.404653741, 0.40122704), (1.1, 4.1), 0),
    5: ((0.333765621, 0.329105196), (1.99, 7.69), 1),
    6: ((0.273907913, 0.268585213), (2.791, 10.921), 2),
  }
  for t, (w, a, q) in row1.items():
    close(tables[t - 1].value[1], w, tolerance)
    close(tables[t - 1].slots.a[1], a, tolerance)
    close(tables[t - 1].slots.q[1], q, 0)
