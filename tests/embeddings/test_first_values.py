import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dlrm_jax.embeddings.directory import Ids
from dlrm_jax.embeddings.first_values import CHUNK, initial_vectors, make_table, start_rows, take
from dlrm_jax.optim.adam import adam
from tests.embeddings.test_directory import random_ids


@pytest.mark.parametrize('dim', [1, 5, 16])
def test_initial_vectors_are_a_truncated_normal(dim):
  values = np.asarray(initial_vectors(3, random_ids(20_000), dim)) * dim**0.5
  assert np.abs(values).max() <= 2 + 1e-5
  for column in (0, dim - 1):
    assert scipy.stats.kstest(values[:, column], scipy.stats.truncnorm(-2, 2).cdf).pvalue > 1e-3


def test_initial_vectors_are_a_function_of_seed_feature_and_key_alone():
  ids = random_ids(200)
  draw = jax.jit(initial_vectors, static_argnums=(0, 2))
  vectors = np.asarray(draw(3, ids, 16))
  order = np.random.default_rng(0).permutation(200)
  np.testing.assert_array_equal(draw(3, take(ids, jnp.asarray(order)), 16), vectors[order])
  changed = [
    (4, ids), (3, Ids(ids.key ^ jnp.array([[1, 0]], jnp.uint32), ids.feature)),
    (3, Ids(ids.key ^ jnp.array([[0, 1]], jnp.uint32), ids.feature)), (3, Ids(ids.key, ids.feature + 1)),
  ]  # fmt: skip
  numbers = [set(vectors.reshape(-1).tolist()), *(set(np.asarray(draw(*c, 16)).reshape(-1).tolist()) for c in changed)]
  assert all(len(a & b) < 10 for i, a in enumerate(numbers) for b in numbers[:i])
  assert all(len(n) > 3190 for n in numbers)


@pytest.mark.parametrize('count', [0, 1, CHUNK, CHUNK + 1, 3000])
def test_start_rows_writes_fresh_rows_and_no_other(count):
  tx = adam(0.1)
  table = make_table(5000, 4, tx)
  table = table.replace(slots=jax.tree.map(lambda leaf: leaf + 7, table.slots), value=table.value + 5)
  rng = np.random.default_rng(count)
  row = rng.permutation(6000).astype(np.int32)[:4000]
  fresh = np.full(4000, 4000, np.int32)
  fresh[:count] = np.sort(rng.permutation(4000)[:count])
  ids = random_ids(4000)
  after = start_rows(
    tx,
    table,
    jnp.asarray(row),
    jnp.asarray(fresh),
    jnp.int32(count),
    lambda lane: initial_vectors(0, take(ids, lane), 4),
  )
  value, slots = np.full((5000, 4), 5, np.float32), np.full((5000, 4), 7, np.float32)
  new = row[fresh[:count]]
  vectors = np.asarray(initial_vectors(0, ids, 4))[fresh[:count]]
  value[new[new < 5000]], slots[new[new < 5000]] = vectors[new < 5000], 0
  np.testing.assert_allclose(after.value, value, rtol=1e-6)
  for leaf in jax.tree.leaves(after.slots):
    np.testing.assert_array_equal(leaf, slots if leaf.ndim else 7)
