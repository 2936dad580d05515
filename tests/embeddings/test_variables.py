"""Embedding variables against plain Python, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings.admission import ADMISSIONS
from dlrm_jax.embeddings.directory import Ids, grow_rows, make_directory
from dlrm_jax.embeddings.eviction import EVICTIONS, evict_ids
from dlrm_jax.embeddings.first_values import initial_vectors, make_table, start_rows, take
from dlrm_jax.embeddings.update import update_rows
from dlrm_jax.native import build
from dlrm_jax.native import directory as kernels
from dlrm_jax.native import rows as row_kernels
from dlrm_jax.optim.adagrad import adagrad
from tests.embeddings import reference_variables as reference

DIM, LANES, FEATURES, RATE, ACCUMULATOR, SEED = 4, 40, 3, 0.5, 0.1, 7
STEPS, EVICT_EVERY, GROW_AT = 120, 7, 80
needs_compiler = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
FORMS = {'xla': (kernels.XLA, row_kernels.XLA), 'native': (kernels.NATIVE, row_kernels.NATIVE)}
BLOOM = {'threshold': 3, 'expected_ids': 60, 'error_rate': 0.05}


def make_admissions(name, form):
  """The admission, and its reference."""
  if name == 'counter':
    admission = ADMISSIONS[name](3, 1, FORMS[form][0])
    return admission._replace(init=lambda: make_directory(32, 2, 8)), reference.Counter(3, 2, 8, 2)
  if name == 'counting_bloom':
    return ADMISSIONS[name](bits=8, kernels=FORMS[form][0], **BLOOM), reference.Bloom(*BLOOM.values())
  return ADMISSIONS[name](FORMS[form][0]), reference.Always()


def draw(rng, step):
  """Ids of one batch: few of them often, in a range that drifts. None stands for padding."""
  number = (rng.zipf(1.3, LANES) % 60 + step // 6).astype(int)
  feature = rng.integers(0, FEATURES, LANES)
  # Ids that share a half of the key, or the whole key with another feature.
  ids = [(n % 5 + 1, n * 0x9E3779B1 % 2**32, f) for n, f in zip(number.tolist(), feature.tolist(), strict=True)]
  return [None if rng.random() < 0.1 else id for id in ids]


def arrays(ids):
  table = np.array([(0, 0, 0) if id is None else id for id in ids], np.uint32)
  return Ids(jnp.asarray(table[:, :2]), jnp.asarray(table[:, 2])), jnp.array([id is not None for id in ids])


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(admission, rows, directory, remembered, table, ids, wanted, gradient, step):
  """What a training step does with its ids."""
  directory, remembered, found = admission.resolve(directory, remembered, ids, wanted, step)
  initial = lambda lane: initial_vectors(SEED, take(ids, lane), DIM)
  tx = adagrad(RATE, initial_accumulator=ACCUMULATOR)
  table = start_rows(tx, table, found.row, found.fresh, found.count, initial, rows)
  vectors = rows.read(table.value, found.row)
  return directory, remembered, update_rows(tx, table, found.row, gradient, kernels=rows), found, vectors


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate(find, rows, directory, table, ids, wanted):
  return rows.read(table.value, directories.find(directory, ids, wanted, find))


jit_entries = jax.jit(directories.entries)
jit_initial = jax.jit(lambda ids: initial_vectors(SEED, ids, DIM))


@jax.jit
def jit_grow(directory, table):
  table = jax.tree.map(lambda leaf: grow_rows(leaf, directory.entry.shape[0]) if leaf.ndim else leaf, table)
  return directories.grow(directory), table


@functools.cache
def initial_of(id):
  return np.asarray(jit_initial(arrays([id])[0])[0], np.float64)


def assert_directory(directory, expected):
  """Every id in its row, with its frequency and version; every other row free."""
  (key, feature), frequency, version = map_numpy(jit_entries(directory))
  alive = np.flatnonzero(frequency)
  found = {
    (int(key[row, 0]), int(key[row, 1]), int(feature[row])): [int(row), int(frequency[row]), int(version[row])]
    for row in alive
  }
  assert found == expected.known
  assert len(alive) == len(found) == int(directory.used)


def map_numpy(tree):
  return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize('eviction', [('never', 0), ('global_step', 6), ('l2', 0.4)], ids=lambda e: e[0])
@pytest.mark.parametrize('admission', sorted(ADMISSIONS))
@pytest.mark.parametrize('form', ['xla', pytest.param('native', marks=needs_compiler)])
def test_equals_plain_python(form, admission, eviction):
  rng = np.random.default_rng([len(form), len(admission), len(eviction[0])])
  admit, reference_admission = make_admissions(admission, form)
  make = lambda: (make_directory(32, 2, 8), admit.init(), make_table(32, DIM, adagrad(RATE, ACCUMULATOR)))
  directory, remembered, table = jax.jit(make)()
  expected = reference.Variables(reference.Ids(2, 8, 2), reference_admission, initial_of, 'adagrad', RATE)
  gone = EVICTIONS[eviction[0]](*eviction[1:] if eviction[0] != 'never' else ())
  evict = jax.jit(functools.partial(evict_ids, gone))
  seen = {'unplaced': 0, 'refused': 0, 'evicted': 0, 'returned': 0}
  left = set()
  for step in range(STEPS):
    ids, gradient = draw(rng, step), rng.normal(size=(LANES, DIM))
    given, wanted = arrays(ids)
    evaluated = evaluate(*FORMS[form], directory, table, given, wanted)
    np.testing.assert_allclose(evaluated, expected.vectors(ids), rtol=1e-4, atol=1e-5)
    assert_directory(directory, expected.ids)
    directory, remembered, table, found, vectors = train(
      admit, FORMS[form][1], directory, remembered, table, given, wanted, jnp.asarray(gradient, jnp.float32), step
    )
    rows, fresh, refused, unplaced = expected.lookup(ids, step)
    expected_vectors = expected.vectors(ids)
    expected.update(ids, gradient)
    found = map_numpy(found)
    assert found.row.tolist() == rows
    assert found.fresh[: int(found.count)].tolist() == fresh
    assert np.flatnonzero(found.refused).tolist() == refused
    assert np.flatnonzero(found.unplaced).tolist() == unplaced
    np.testing.assert_allclose(vectors, expected_vectors, rtol=1e-4, atol=1e-5)
    assert_directory(directory, expected.ids)
    if admission == 'counter':
      assert_directory(remembered, reference_admission.waiting)
    if admission == 'counting_bloom':
      assert remembered.tolist() == [reference_admission.counters]
    seen['unplaced'] += len(unplaced)
    seen['refused'] += len(refused)
    seen['returned'] += len({ids[lane] for lane in fresh} & left)
    if step % EVICT_EVERY == EVICT_EVERY - 1:
      before, used = set(expected.ids.known), int(directory.used)
      directory, remembered = evict(directory, remembered, table.value, step)
      number = expected.evict(*eviction, step)
      assert used - int(directory.used) == number
      left |= before - set(expected.ids.known)
      seen['evicted'] += number
    if step == GROW_AT:
      directory, table = jit_grow(directory, table)
      expected.ids.grow()
  # That the steps came through all that they are to show.
  assert seen['unplaced'] > 0
  assert (seen['refused'] > 0) == (admission != 'always')
  assert (seen['evicted'] > 0) == (seen['returned'] > 0) == (eviction[0] != 'never')
