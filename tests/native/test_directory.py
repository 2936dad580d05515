"""The kernels of a directory in C++ against those in XLA, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings.directory import Ids, make_directory
from dlrm_jax.native import build
from dlrm_jax.native.directory import NATIVE, XLA
from tests.helpers import outputs_on_threads

pytestmark = pytest.mark.skipif(not build.load().ready, reason=build.load().note)


def draw(rng, lanes, ids):
  """Lanes that repeat, whose keys share halves."""
  number = rng.zipf(1.1, lanes).astype(np.uint64) % ids
  key = np.stack([number % 1000, number * 0x9E3779B1 % 2**32], axis=1).astype(np.uint32)
  wanted = rng.random(lanes) < 0.9
  return Ids(jnp.asarray(key), jnp.asarray(rng.integers(0, 26, lanes, dtype=np.uint32))), jnp.asarray(wanted)


def draw_times(rng, wanted):
  """How many occurrences each wanted lane stands for."""
  return jnp.asarray(rng.geometric(0.5, len(wanted)).astype(np.uint32) * np.asarray(wanted))


@functools.cache
def jit(name, kernels):
  return jax.jit(functools.partial(getattr(directories, name), kernels=kernels))


# Some directories overflow, some do not; with 8 ways and with other numbers; on one thread and on several.
@pytest.mark.parametrize(
  ('rows', 'ways', 'buckets', 'lanes'),
  [
    (40_000, 8, 64, 9_000),
    (2_000, 8, 64, 4_000),
    (512, 8, 64, 100),
    (300, 3, 4, 3_000),
    (64, 1, 1, 5_000),
    (8, 8, 1, 1),
  ],
)
def test_find_and_claim(rows, ways, buckets, lanes):
  rng = np.random.default_rng(lanes)
  found = [make_directory(rows, ways, buckets)] * 2
  for step in range(6):
    ids, wanted = draw(rng, lanes, rows)
    times = draw_times(rng, wanted)
    before = [jit('find', kernels)(d, ids, wanted) for kernels, d in zip((XLA, NATIVE), found, strict=True)]
    np.testing.assert_array_equal(*before)
    claimed = [jit('claim', kernels)(d, ids, times, step) for kernels, d in zip((XLA, NATIVE), found, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *claimed)
    found = [directory for directory, _ in claimed]
    # Somebody must be able to claim again.
    gone = jnp.asarray(rng.random(directories.rows_of(found[0])) < 0.2)
    found = [directories.evict(directory, gone) for directory in found]


@pytest.mark.parametrize('dtype', [jnp.uint8, jnp.uint16, jnp.uint32])
@pytest.mark.parametrize(('size', 'lanes', 'limit'), [(50, 3_000, 200), (100_000, 5_000, 3), (7, 1, 1)])
def test_bloom_add(size, lanes, limit, dtype):
  rng = np.random.default_rng(size)
  counters = [jnp.zeros((3, size), dtype)] * 2
  adds = [jax.jit(kernels.add, static_argnums=(4, 5)) for kernels in (XLA, NATIVE)]
  for _ in range(4):
    word = jnp.asarray(rng.integers(0, 2**32, (lanes, 2), dtype=np.uint32)[rng.zipf(1.5, lanes) % lanes])
    region = jnp.asarray(rng.integers(-1, 3, lanes, dtype=np.int32))
    times = draw_times(rng, np.ones(lanes, bool))
    results = [add(c, word, region, times, 5, limit) for add, c in zip(adds, counters, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    counters = [result[0] for result in results]
  assert counters[0].max() <= limit


@pytest.mark.parametrize('kernels', [XLA, NATIVE], ids=['xla', 'native'])
def test_claims_are_made_in_place(kernels):
  """On a donated directory: it is aliased, and the temporary memory has not even a byte per row."""
  directory = jax.eval_shape(functools.partial(make_directory, 20_000_000))
  ids, wanted = draw(np.random.default_rng(0), 2_000, 100)
  claim = jax.jit(functools.partial(directories.claim, kernels=kernels), donate_argnums=0)
  memory = claim.lower(directory, ids, wanted, jnp.int32(0)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < directories.rows_of(directory)
  assert memory.alias_size_in_bytes >= directory.entry.size * 4


MANY_LANES = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from dlrm_jax.embeddings.directory import Ids, claim, make_directory
from dlrm_jax.native import build
from dlrm_jax.native.directory import NATIVE
assert build.load().ready
rng = np.random.default_rng(0)
key = rng.integers(0, 300, (70_000, 2), dtype=np.uint32)
ids = Ids(key, rng.integers(0, 26, 70_000, dtype=np.uint32))
result = claim(make_directory(60_000), ids, np.ones(70_000, bool), jnp.int32(5), NATIVE)
region, times = key[:, 0].astype(np.int32) % 9, np.ones(70_000, np.uint32)
counters, least = NATIVE.add(jnp.zeros((9, 10_000), jnp.uint8), key, region, times, 7, 9)
leaves = [*jax.tree.leaves(result), counters, least]
print(hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit(repository):
  assert len(set(outputs_on_threads(MANY_LANES, repository, 1, 2, 5))) == 1
