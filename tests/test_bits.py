"""Rounding to bfloat16 at random, against exact arithmetic."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dlrm_jax import bits
from dlrm_jax.native.rows import XLA
from dlrm_jax.optim.adam import adam
from dlrm_jax.optim.rowwise import init_slots, update_distinct

ROWS = jnp.arange(4000, dtype=jnp.int32)
LIKE = jnp.zeros((1, 1), jnp.uint16)


def rounded(value, step, row=ROWS):
  """float32 numbers that a value is rounded to, one for each row."""
  wide = jnp.full((len(row), 1), value, jnp.float32)
  return np.asarray(bits.widen(bits.narrow(wide, LIKE, row, jnp.int32(step))))[:, 0]


def neighbours(value):
  """The bfloat16 numbers below and above (in magnitude)."""
  low = np.float32(value).view(np.uint32) & 0xFFFF0000
  return np.array([low, low + 0x10000], np.uint32).view(np.float32)


@pytest.mark.parametrize('value', [1.001, -3.14159, 1e-20, -7e5, 0.1])
def test_rounds_to_a_neighbour_as_often_as_it_is_near(value):
  low, high = neighbours(value)
  found = np.concatenate([rounded(value, step) for step in range(25)])
  assert set(np.unique(found)) <= {low, high}
  share = (np.float32(value) - low) / (high - low)
  # Four standard deviations of 100,000 draws.
  assert abs((found == high).mean() - share) < 4 * np.sqrt(share * (1 - share) / len(found))


@pytest.mark.parametrize('value', [0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, ml_dtypes.finfo(ml_dtypes.bfloat16).max])
def test_keeps_what_bfloat16_has(value):
  assert (rounded(value, 3) == np.float32(value)).all()


def test_nan_stays_nan():
  assert np.isnan(rounded(np.uint32(0x7FFFFFFF).view(np.float32), 5)).all()


def test_draws_depend_on_row_step_place_and_leaf_but_not_on_the_lane():
  draw = np.asarray(bits.noise(ROWS, (16,), jnp.int32(1), 0))
  assert len(np.unique(draw)) > 0.99 * draw.size
  assert (np.asarray(bits.noise(ROWS[::-1], (16,), jnp.int32(1), 0)) == draw[::-1]).all()
  for other in (bits.noise(ROWS, (16,), jnp.int32(2), 0), bits.noise(ROWS, (16,), jnp.int32(1), 1)):
    assert (np.asarray(other) != draw).mean() > 0.99
  ones = np.unpackbits(draw.view(np.uint8)).reshape(-1, 32).mean(axis=0)
  np.testing.assert_allclose(ones, 0.5, atol=0.02)


def test_to_nearest_is_ml_dtypes():
  value = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  assert (np.asarray(bits.to_nearest(jnp.asarray(value))) == value.astype(ml_dtypes.bfloat16).view(np.uint16)).all()


def test_small_updates_are_not_lost():
  # 1000 steps of 1e-4 from 1, below which bfloat16 has steps of 4e-3: rounded to the nearest, nothing would move.
  value = bits.to_nearest(jnp.ones((64, 8)))
  tx, row, grad, count = optax.sgd(1e-4), jnp.arange(64, dtype=jnp.int32), jnp.ones((64, 8)), jnp.int32(64)
  slots = init_slots(tx, value)
  update = jax.jit(lambda value, slots, step: update_distinct(tx, value, slots, row, grad, count, 0.0, XLA, step))
  for step in range(1000):
    value, slots = update(value, slots, step)
  found = np.asarray(bits.widen(value))
  # A walk of 1000 roundings, each within 4e-3: its deviation is sqrt(0.1 * 4e-3).
  assert abs(found.mean() - 0.9) < 4 * 0.02 / np.sqrt(found.size)


def test_one_step_is_the_step_in_float32_rounded():
  rng = np.random.default_rng(1)
  wide = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
  value, row = bits.to_nearest(wide), jnp.asarray(rng.permutation(50)[:20], jnp.int32)
  grad, tx = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32), adam(0.01)
  start = bits.widen(value)
  new, slots = update_distinct(tx, value, init_slots(tx, value), row, grad, jnp.int32(20))
  exact, exact_slots = update_distinct(tx, start, init_slots(tx, start), row, grad, jnp.int32(20))
  stored = [leaf for leaf in (new, *jax.tree.leaves(slots)) if leaf.ndim]
  assert {str(leaf.dtype) for leaf in stored} == {'uint16'}
  for found, wanted in zip(stored, [leaf for leaf in (exact, *jax.tree.leaves(exact_slots)) if leaf.ndim], strict=True):
    found, wanted = np.asarray(bits.widen(found)), np.asarray(wanted)
    assert (np.abs(found - wanted) <= np.abs(wanted) * 2**-7).all()
  untouched = np.setdiff1d(np.arange(50), row)
  assert (np.asarray(new)[untouched] == np.asarray(value)[untouched]).all()
