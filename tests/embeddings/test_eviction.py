import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings.directory import Ids, make_directory
from dlrm_jax.embeddings.eviction import evict_ids, global_step, l2, least_recent
from tests.embeddings.test_directory import fill, random_ids


def aged():
  """A directory with ten ids each of the steps 1 to 30, and each row's step; free rows: 0."""
  directory = make_directory(512)
  ids = random_ids(300)
  for step in range(1, 31):
    part = Ids(ids.key[step * 10 - 10 : step * 10], ids.feature[step * 10 - 10 : step * 10])
    directory, _ = fill(directory, part, step=step)
  entries = directories.entries(directory)
  return directory, np.where(np.asarray(entries.frequency) > 0, np.asarray(entries.version), 0)


@pytest.mark.parametrize(('keep', 'oldest'), [(0, 31), (9, 31), (10, 30), (155, 16), (299, 2), (300, 1), (400, 1)])
def test_the_least_recent_go(keep, oldest):
  directory, step = aged()
  after = directories.evict(directory, jax.jit(least_recent, static_argnums=1)(directory, keep))
  left = np.asarray(directories.entries(after).frequency) > 0
  np.testing.assert_array_equal(left, step >= oldest)
  assert int(after.used) == (step >= oldest).sum()


def test_the_age_that_evicts_is_strictly_more_than_steps_to_live():
  directory, step = aged()
  after, _ = evict_ids(global_step(10), directory, (), jnp.zeros((512, 4)), jnp.int32(35))
  np.testing.assert_array_equal(np.asarray(directories.entries(after).frequency) > 0, step >= 25)


def test_l2_is_half_the_squared_norm_and_spares_the_waiting():
  directory, step = aged()
  value = jnp.asarray(step[:, None] * np.ones((1, 4)), jnp.float32)  # half the squared norm: 2 step^2
  after, waiting = evict_ids(l2(2 * 20.0**2), directory, directory, value, jnp.int32(35))
  np.testing.assert_array_equal(np.asarray(directories.entries(after).frequency) > 0, step >= 20)
  assert int(waiting.used) == 300
