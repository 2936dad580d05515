import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.embeddings.admission import bloom_size, counting_bloom
from dlrm_jax.embeddings.directory import make_directory, rows_of
from tests.embeddings.test_directory import random_ids


# Of the sample's own numbers (DeepRec, embedding_config.h), worked out by hand.
@pytest.mark.parametrize(
  ('ids', 'error', 'hashes', 'size'),
  [(1000, 0.01, 7, 9586), (1000, 0.001, 10, 14378), (9_200_000, 0.01, 7, 88_182_000)],
)
def test_bloom_size(ids, error, hashes, size):
  found = bloom_size(ids, error)
  assert found[0] == hashes
  assert found[1] == pytest.approx(size, rel=1e-5 if ids > 1000 else 0)


def test_a_bloom_filter_too_large_to_index_is_refused():
  with pytest.raises(ValueError, match='10291877888 counters'):
    bloom_size(2**30, 0.01)


@pytest.mark.parametrize(('bits', 'threshold'), [(8, 249), (16, 2**16), (64, 3), (7, 3)])
def test_counters_that_cannot_count_to_the_threshold_are_refused(bits, threshold):
  with pytest.raises(ValueError, match='must be one of'):
    counting_bloom(threshold, 1000, 0.01, bits)


def test_a_bloom_filter_keeps_its_error_rate():
  """Full of as many ids as expected: of the unseen, its error rate is admitted one lookup too early."""
  admission = counting_bloom(2, 5000, 0.02, 8)
  resolve = jax.jit(admission.resolve)
  ids, others = random_ids(5000, 1), random_ids(5000, 2)
  directory, counters, _ = resolve(make_directory(20_000), admission.init(), ids, jnp.ones(5000, bool), 0)
  again = resolve(directory, counters, ids, jnp.ones(5000, bool), 1)[2]
  assert (np.asarray(again.row) < rows_of(directory)).all()
  early = 0
  for start in range(0, 5000, 200):
    few = jax.tree.map(lambda x: x[start : start + 200], others)  # noqa: B023
    early += int(resolve(directory, counters, few, jnp.ones(200, bool), 1)[2].count)
  assert 0.01 < early / 5000 < 0.04


@functools.cache
def counted(threshold):
  return counting_bloom(threshold, 1000, 0.001, 8)


@pytest.mark.parametrize('threshold', [1, 2, 200])
def test_many_occurrences_in_one_batch_admit_at_once_and_wrap_no_counter(threshold):
  admission = counted(threshold)
  ids = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (1000, *x.shape[1:])), random_ids(1))
  _, counters, found = admission.resolve(make_directory(1), admission.init(), ids, jnp.ones(1000, bool), jnp.int32(0))
  assert (np.asarray(found.row) < 512).all()
  assert int(found.count) == 1
  assert int(counters.max()) == threshold
