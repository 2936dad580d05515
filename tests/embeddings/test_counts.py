import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.embeddings.admission import counter
from dlrm_jax.embeddings.counts import admitted_of, lookups_of
from dlrm_jax.embeddings.directory import Ids, Shard, make_directory
from tests.embeddings import reference_variables as reference

STEPS = 12
PARTS = ('lookups', 'admitted', 'refused', 'unplaced')


# 3000 lanes: the new ids of a batch come in more than one chunk of them.
@pytest.mark.parametrize(('columns', 'examples'), [((0, 1, 2), 1000), ((25, 3), 60), ((7,), 60)])
@pytest.mark.parametrize('shards', [1, 4])
def test_equals_plain_python_column_by_column(columns, examples, shards):
  rng = np.random.default_rng([examples, shards])
  pages = 4
  admit = counter(2, pages * 16)
  admit = admit._replace(init=lambda: make_directory(pages // shards * 16, 2, 8))
  resolve = jax.jit(admit.resolve, static_argnums=5)
  def count(ids, wanted, found):
    counts = lookups_of(len(columns), wanted, found.refused, found.unplaced)
    return counts.replace(admitted=admitted_of(columns, ids, found))

  count = jax.jit(count)
  own = [(make_directory(pages // shards * 16, 2, 8), admit.init()) for _ in range(shards)]
  expected = reference.Variables(reference.Ids(pages, 8, 2), reference.Counter(2, pages, 8, 2))
  totals = collections.Counter()
  for step in range(STEPS):
    real = rng.random(examples) < 0.9  # the others are padding
    ids = [
      (int(number), 5, column) if is_real else None
      for is_real, numbers in zip(real, rng.zipf(1.5, (examples, len(columns))) % 100 + step, strict=True)
      for number, column in zip(numbers, columns, strict=True)
    ]
    key = jnp.array([id[:2] if id else (0, 0) for id in ids], jnp.uint32)
    given = Ids(key, jnp.tile(jnp.array(columns, jnp.uint32), examples))
    wanted = jnp.array([id is not None for id in ids])
    found = {part: np.zeros(len(columns), int) for part in PARTS}
    for number, (directory, waiting) in enumerate(own):
      shard = Shard(number, shards)
      *own[number], resolved = resolve(directory, waiting, given, wanted, step, shard)
      mine = wanted & jnp.array([bool(id) and reference.words(id)[0] * shards >> 32 == number for id in ids])
      counts = count(given, mine, resolved)
      assert counts.evicted.tolist() == [0] * len(columns)
      for part in PARTS:
        found[part] += np.asarray(getattr(counts, part))
    _, fresh, refused, unplaced = expected.lookup(ids, step)
    lookups = np.flatnonzero(wanted)
    for part, lanes in zip(PARTS, (lookups, fresh, refused, unplaced), strict=True):
      python = collections.Counter(ids[lane][2] for lane in lanes)
      assert found[part].tolist() == [python[column] for column in columns], part
      totals[part] += len(lanes)
  assert all(totals[part] > 0 for part in PARTS)
