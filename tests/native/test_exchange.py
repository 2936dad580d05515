"""Lookups that meet, and sums of what comes to one place, in C++ and in XLA, beside plain Python."""


import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.native import build
from dlrm_jax.native.exchange import NATIVE, XLA
from tests.native.trees import merge_sum

needs_compiler = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
FORMS = [pytest.param(NATIVE, id='C++', marks=needs_compiler), pytest.param(XLA, id='XLA')]
DEVICES = 3
# Ids of a directory: two words and a feature, of which some agree in all but one; an owner who may be nobody.
words = st.sampled_from([0, 1, 2, 2**31, 2**32 - 1])
lookups = st.lists(st.tuples(words, words, st.integers(0, 3), st.booleans()), min_size=1, max_size=80)


def owner_of(id):
  return sum(id) % DEVICES


def meet(kernels, ids, wanted):
  key = jnp.asarray(np.array([id[:-1] for id in ids], np.uint32))
  feature = jnp.asarray(np.array([id[-1] for id in ids], np.uint32))
  owner = [owner_of(id) if wants else DEVICES for id, wants in zip(ids, wanted, strict=True)]
  met = kernels.meet(key, feature, jnp.array(owner, jnp.int32), DEVICES)
  return type(met)(*(np.asarray(part).tolist() for part in met))


def check(met, ids, wanted):
  """All that is promised but that no id stands twice. Returns the ids by place."""
  places = met.start[DEVICES]
  assert len(met.start) == DEVICES + 1
  found = [ids[lane] for lane in met.lane[:places]]
  assert met.owner == [owner_of(id) for id in found] + [DEVICES] * (len(ids) - places)
  assert met.owner == sorted(met.owner)
  assert met.start == [sum(owner < device for owner in met.owner) for device in range(DEVICES)] + [places]
  looked_up = [lane for lane in range(len(ids)) if wanted[lane]]
  assert all(met.place[lane] == len(ids) for lane in range(len(ids)) if not wanted[lane])
  assert [ids[lane] for lane in looked_up] == [found[met.place[lane]] for lane in looked_up]
  of_place = [[lane for lane in looked_up if met.place[lane] == place] for place in range(places)]
  assert met.times == [len(lanes) for lanes in of_place] + [0] * (len(ids) - places)
  assert met.lane[:places] == [lanes[0] for lanes in of_place]
  for device in range(DEVICES):
    lanes = met.lane[met.start[device] : met.start[device + 1]]
    assert lanes == sorted(lanes)
  return found


@pytest.mark.parametrize('kernels', FORMS)
@given(lookups=lookups)
@settings(max_examples=60, deadline=None)
def test_meet(kernels, lookups):
  ids, wanted = [id for *id, _ in lookups], [wants for *_, wants in lookups]
  ids = list(map(tuple, ids))
  found = check(meet(kernels, ids, wanted), ids, wanted)
  if kernels is NATIVE:
    assert len(found) == len(set(found))


@pytest.mark.parametrize('kernels', FORMS)
@pytest.mark.parametrize('number', [1, 40, 13_312])
def test_meet_many_lookups_of_one_word(kernels, number):
  rng = np.random.default_rng(number)
  ids = [(int(word), 0) for word in rng.zipf(1.2, number) % 2**31]
  wanted = (rng.random(number) < 0.9).tolist()
  found = check(meet(kernels, ids, wanted), ids, wanted)
  # XLA's form may leave a few apart that share a hash.
  distinct = len({id for id, wants in zip(ids, wanted, strict=True) if wants})
  assert distinct <= len(found) <= distinct * (1 if kernels is NATIVE else 1.01)


@pytest.mark.parametrize('kernels', FORMS)
@pytest.mark.parametrize(('lanes', 'places', 'dim'), [(0, 3, 4), (1, 1, 1), (70, 9, 16), (20_000, 5_000, 3)])
def test_add(kernels, lanes, places, dim):
  rng = np.random.default_rng(lanes)
  place = rng.integers(0, places + 1, lanes)  # the last is nowhere
  values = rng.normal(size=(lanes, dim))
  expected = np.zeros((places + 1, dim))
  np.add.at(expected, place, values)
  found = kernels.add(jnp.asarray(place, jnp.int32), jnp.asarray(values, jnp.float32), places, max(lanes, 1))
  np.testing.assert_allclose(found, expected[:places], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize('leaf', [20_000, 5_000, 2_600, 700, 1])
def test_add_leaf_by_leaf(leaf):
  rng = np.random.default_rng(0)
  place, values = rng.integers(0, 50, 20_000), rng.normal(size=(20_000, 2)).astype(np.float32)
  place[5_000:] = np.minimum(place[5_000:] + rng.integers(0, 9), 50)
  found = NATIVE.add(jnp.asarray(place, jnp.int32), jnp.asarray(values), 50, leaf)
  np.testing.assert_array_equal(found, merge_sum(place, values, 50, leaf))
