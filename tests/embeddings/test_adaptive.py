"""Adaptive embedding against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.embeddings.adaptive import initial_from, shared_rows
from dlrm_jax.embeddings.admission import counter
from dlrm_jax.embeddings.directory import Ids, make_directory
from dlrm_jax.embeddings.dynamic import make_table, start_rows
from dlrm_jax.embeddings.update import update_rows
from dlrm_jax.native.rows import XLA
from dlrm_jax.optim.sgd import sgd

THRESHOLD, SHARED, LANES, DIM, RATE = 4, 5, 24, 3, 0.1


def test_equals_plain_python():
  rng = np.random.default_rng(0)
  tx, admission = sgd(RATE), counter(THRESHOLD, 512)
  start = rng.normal(size=(SHARED, DIM))
  shared_table = make_table(SHARED, DIM, tx).replace(value=jnp.asarray(start, jnp.float32))
  state = make_directory(512), admission.init(), make_table(512, DIM, tx), shared_table
  shared, own, seen = dict(enumerate(start)), {}, {}

  @jax.jit
  def train(state, number, gradient, step):
    directory, waiting, table, shared_table = state
    ids = Ids(jnp.stack([number, number], axis=1), jnp.zeros(LANES, jnp.uint32))
    hash_row = (number % SHARED).astype(jnp.int32)
    directory, waiting, found = admission.resolve(directory, waiting, ids, jnp.ones(LANES, bool), step)
    table = start_rows(tx, table, found.row, found.fresh, found.count, initial_from(shared_table.value, hash_row))
    hash_row = shared_rows(found.row < 512, hash_row, SHARED)
    vectors = XLA.read(table.value, found.row) + XLA.read(shared_table.value, hash_row)
    table = update_rows(tx, table, found.row, gradient)
    return (directory, waiting, table, update_rows(tx, shared_table, hash_row, gradient)), vectors

  for step in range(60):
    number = rng.zipf(1.5, LANES) % 100
    gradient = rng.normal(size=(LANES, DIM))
    state, vectors = train(state, jnp.asarray(number, jnp.uint32), jnp.asarray(gradient, jnp.float32), step)
    for n in number:
      seen[n] = seen.get(n, 0) + 1
    for n in number:
      if seen[n] >= THRESHOLD and n not in own:
        own[n] = shared[n % SHARED].copy()
    expected = [own[n] if n in own else shared[n % SHARED] for n in number]
    np.testing.assert_allclose(vectors, np.stack(expected), rtol=1e-4, atol=1e-4)
    total = {}
    for n, g in zip(number, gradient, strict=True):
      place = (own, n) if n in own else (shared, n % SHARED)
      total.setdefault((place[0] is own, place[1]), np.zeros(DIM))
      total[place[0] is own, place[1]] += g
    for (is_own, n), g in total.items():
      table = own if is_own else shared
      table[n] = table[n] - RATE * g
  assert 10 < len(own) < len(seen)
