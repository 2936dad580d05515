import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlrm_jax.optim.rowwise import CHUNK, init_slots, update_distinct
from tests.optim import reference


@pytest.mark.parametrize('case', reference.CASES)
def test_slots_are_per_row_or_shared(case):
  slots = init_slots(reference.make(case, 0.1), jnp.ones((5, 3)))
  assert {leaf.shape for leaf in jax.tree.leaves(slots)} <= {(), (5, 1), (5, 3)}


def test_a_transformation_that_is_not_element_wise_is_refused():
  tx = optax.GradientTransformation(lambda w: {'column': jnp.zeros(w.shape[1])}, lambda g, s, w: (g, s))
  with pytest.raises(ValueError, match=r"slot \['column'\] has shape \(3,\); on a table of 5 rows"):
    init_slots(tx, jnp.ones((5, 3)))


@pytest.mark.parametrize('count', [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_only_the_first_lanes_count_and_shared_slots_advance_once(count):
  rng = np.random.default_rng(count)
  rows = 3 * CHUNK
  tx = reference.make('adam', 0.1)
  value = rng.normal(size=(rows, 2))
  row = np.concatenate([rng.permutation(rows)[:count], np.full(2 * CHUNK - count, rows)]).astype(np.int32)
  grad = rng.normal(size=(2 * CHUNK, 2))
  expected, state = value, reference.init('adam', value)
  found, slots = jnp.asarray(value, jnp.float32), init_slots(tx, jnp.asarray(value, jnp.float32))
  step = jax.jit(
    lambda value, slots: update_distinct(tx, value, slots, jnp.asarray(row), jnp.float32(grad), jnp.int32(count))
  )
  for t in (1, 2):
    expected, state = reference.step_rows('adam', expected, state, t, 0.1, row, grad)
    found, slots = step(found, slots)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  reference.assert_state(slots, state, 1e-5)
  assert slots.count == 2
