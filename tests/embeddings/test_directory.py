import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings.admission import ADMISSIONS, always, counter, counting_bloom
from dlrm_jax.embeddings.directory import BYTES_PER_ROW, Entries, Ids, Shard, make_directory, rows_of
from dlrm_jax.native import build
from dlrm_jax.native.directory import FREQUENCY, MOST_FREQUENCY, NATIVE, XLA

FORMS = [XLA, pytest.param(NATIVE, marks=pytest.mark.skipif(not build.load().ready, reason=build.load().note))]
names = {'argnames': 'kernels', 'argvalues': FORMS, 'ids': ['xla', 'native']}


def random_ids(n, seed=0):
  """All different."""
  rng = np.random.default_rng(seed)
  return Ids(jnp.asarray(rng.integers(0, 2**32, (n, 2), dtype=np.uint32)), jnp.arange(n, dtype=jnp.uint32) % 26)


@functools.cache
def jit(name, kernels=XLA):
  return jax.jit(functools.partial(getattr(directories, name), kernels=kernels))


def fill(directory, ids, kernels=XLA, step=1):
  return jit('claim', kernels)(directory, ids, jnp.ones(len(ids.feature), bool), step)


@pytest.mark.parametrize(**names)
def test_keys_and_features_are_compared_in_full(kernels):
  """All in one bucket: only the comparison can tell them apart."""
  words = [0, 1, 1 << 31]
  ids = [(low, high, feature) for low in words for high in words for feature in (0, 1, 31)]
  table = np.array(ids, np.uint32)
  directory, claimed = fill(
    make_directory(32, 32, 1), Ids(jnp.asarray(table[:, :2]), jnp.asarray(table[:, 2])), kernels
  )
  assert sorted(claimed.row.tolist()) == list(range(27))
  assert int(claimed.count) == int(directory.used) == 27


@pytest.mark.parametrize(**names)
def test_find_counts_nothing_and_inserts_nothing(kernels):
  ids = random_ids(300)
  directory, _ = fill(make_directory(512), Ids(ids.key[:100], ids.feature[:100]), kernels)
  before = np.array(directory.entry)
  row = jit('find', kernels)(directory, ids, jnp.ones(300, bool))
  assert (np.asarray(row[100:]) == 512).all()
  assert (np.asarray(row[:100]) < 512).all()
  np.testing.assert_array_equal(directory.entry, before)


@pytest.mark.parametrize(**names)
def test_a_frequency_never_wraps(kernels):
  ids = Ids(jnp.zeros((5, 2), jnp.uint32), jnp.zeros(5, jnp.uint32))
  directory, claimed = fill(make_directory(1), ids, kernels)
  directory = directories.set_frequency(directory, claimed.row[:1], jnp.array([MOST_FREQUENCY], jnp.uint32))
  for _ in range(3):
    directory, again = fill(directory, ids, kernels)
  assert again.row.tolist() == claimed.row.tolist()
  assert int(directories.frequency(directory, claimed.row)[0]) >= MOST_FREQUENCY


@pytest.mark.parametrize('load', [0.55, 0.7])
def test_hardly_any_id_finds_no_place_below_the_load_at_which_a_directory_grows(load):
  rows = 1 << 17
  directory = make_directory(rows)
  ids = random_ids(int(load * rows))
  directory, claimed = fill(directory, ids)
  assert rows - int(directory.used) >= (1 - load) * rows
  assert np.mean(np.asarray(claimed.row) == rows) < (1e-4 if load < 0.6 else 1e-3)


def test_growing_keeps_every_id_in_its_page_with_all_that_is_known_of_it():
  directory, claimed = fill(make_directory(3 * 512), random_ids(1400))  # three pages, nearly full
  value = jnp.arange(3 * 512)
  values = {}
  for grown in range(3):
    alive = np.asarray(claimed.row) < rows_of(directory)
    if grown == 0:
      placed, values = alive, np.asarray(value)[np.asarray(claimed.row)[alive]]
    entries = jax.jit(directories.entries)(directory)
    row = np.asarray(jit('find')(directory, random_ids(1400), jnp.ones(1400, bool)))
    np.testing.assert_array_equal(row < rows_of(directory), placed)
    np.testing.assert_array_equal(np.asarray(value)[row[placed]], values)
    assert (np.asarray(entries.version)[row[placed]] == 1).all()
    assert (np.asarray(entries.frequency)[row[placed]] == 1).all()
    assert np.count_nonzero(entries.frequency) == int(directory.used) == placed.sum()
    pages = directory.entry.shape[0]
    value, directory, old = directories.grow_rows(value, pages), jax.jit(directories.grow)(directory), row
    new = np.asarray(jit('find')(directory, random_ids(1400), jnp.ones(1400, bool)))[placed]
    np.testing.assert_array_equal(new // 512 // 2, old[placed] // 512)
  # Those without a place now find one.
  directory, claimed = fill(directory, random_ids(1400))
  assert int(directory.used) == 1400


@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('name', sorted(ADMISSIONS))
@pytest.mark.parametrize(**names)
def test_shards_come_to_the_same_as_the_whole(kernels, name, count):
  """Each with its own pages of the directory, and its own part of the filter."""
  rng = np.random.default_rng(count)
  admission = {
    'always': lambda: always(kernels),
    'counter': lambda: counter(2, 4 * 512, kernels),
    'counting_bloom': lambda: counting_bloom(2, 500_000, 0.1, 8, kernels),
  }[name]()
  cut = lambda leaf, i: leaf[i * len(leaf) // count : (i + 1) * len(leaf) // count] if leaf.ndim else leaf
  part = lambda tree, i: jax.tree.map(lambda leaf: cut(leaf, i), tree)
  whole = make_directory(4 * 512), admission.init()
  shards = [part(whole, i) for i in range(count)]
  resolve = jax.jit(admission.resolve, static_argnames='shard')
  for step in range(3):
    ids = jax.tree.map(lambda x: x[rng.integers(0, 3000, 4000)], random_ids(3000))
    wanted = jnp.asarray(rng.random(4000) < 0.9)
    *whole, found = resolve(*whole, ids, wanted, step)
    rows = 4 * 512 // count
    row, fresh, refused, unplaced = np.full(4000, 4 * 512), set(), np.zeros(4000, bool), np.zeros(4000, bool)
    for i in range(count):
      *shards[i], mine = resolve(*shards[i], ids, wanted, step, shard=Shard(i, count))
      assert not (refused & mine.refused).any()
      row = np.where(np.asarray(mine.row) < rows, np.asarray(mine.row) + i * rows, row)
      fresh |= set(np.asarray(mine.fresh)[: int(mine.count)].tolist())
      refused, unplaced = refused | np.asarray(mine.refused), unplaced | np.asarray(mine.unplaced)
      expected = part(tuple(whole), i)
      for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(shards[i]), strict=True):
        if a.ndim:
          np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(row, found.row)
    np.testing.assert_array_equal(refused, found.refused)
    np.testing.assert_array_equal(unplaced, found.unplaced)
    assert sorted(fresh) == np.asarray(found.fresh)[: int(found.count)].tolist()
    assert sum(int(shard[0].used) for shard in shards) == int(whole[0].used)
  assert int(whole[0].used) > 100


def test_inserting_into_another_capacity():
  ids = random_ids(400)
  old, _ = fill(make_directory(512), ids, step=5)
  old = directories.set_frequency(old, jit('find')(old, ids, jnp.ones(400, bool)), jnp.arange(1, 401, dtype=jnp.uint32))
  new, row = directories.insert(make_directory(5 * 512), directories.entries(old))
  found = jit('find')(new, ids, jnp.ones(400, bool))
  placed = np.asarray(jit('find')(old, ids, jnp.ones(400, bool))) < 512
  assert int(new.used) == int(old.used) == placed.sum()
  entries = directories.entries(new)
  np.testing.assert_array_equal(np.asarray(entries.frequency)[np.asarray(found)[placed]], np.arange(1, 401)[placed])
  assert (np.asarray(entries.version)[np.asarray(found)[placed]] == 5).all()
  assert (np.asarray(row) < 5 * 512).sum() == placed.sum()


def test_inserting_where_there_is_no_room_says_so():
  full = Entries(random_ids(600), jnp.ones(600, jnp.uint32), jnp.zeros(600, jnp.int32))
  directory, row = directories.insert(make_directory(512), full)
  assert (np.asarray(row) == 512).sum() == 600 - int(directory.used) >= 88


def test_ids_per_feature():
  ids = random_ids(260)
  directory, claimed = fill(make_directory(2048), ids)
  gone = np.zeros(2048, bool)
  gone[np.asarray(claimed.row)[np.asarray(ids.feature) == 3]] = True
  after = directories.evict(directory, jnp.asarray(gone))
  features = jnp.arange(26, dtype=jnp.uint32)
  assert directories.ids_per_feature(directory, features).tolist() == [10] * 26
  assert directories.ids_per_feature(after, features).tolist() == [10 - 10 * (feature == 3) for feature in range(26)]
  assert directories.gone_per_feature(directory, after, features[5:1:-1]).tolist() == [0, 0, 10, 0]


def test_when_to_grow():
  directory = make_directory(512)
  assert not directories.is_full(directory, 1000, 1)
  assert directories.is_full(directory, 1000, 2)
  directory, _ = fill(directory, random_ids(400))
  assert directories.is_full(directory, 1000, 0)


@pytest.mark.parametrize(('rows', 'ways', 'buckets'), [(0, 8, 64), (2**31, 8, 64), (10, 33, 64), (10, 8, 63)])
def test_a_directory_that_cannot_be(rows, ways, buckets):
  with pytest.raises(ValueError, match='='):
    make_directory(rows, ways, buckets)


def test_bytes_per_row():
  directory = make_directory(1000)
  assert directory.entry.nbytes == BYTES_PER_ROW * rows_of(directory) == 16 * 1024
  assert directory.entry.shape[2] > FREQUENCY
