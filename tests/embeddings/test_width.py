"""The policy of dynamic dimensions against DeepRec's formulas in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings.directory import Ids, make_directory
from dlrm_jax.embeddings.width import blocks_of, forget_free, make_widths, mask, refresh
from tests.embeddings.test_directory import fill

BLOCKS, LANES, P, BETA = 4, 60, 2.0, 0.9


def test_equals_plain_python():
  rng = np.random.default_rng(1)
  directory = make_directory(1024)
  widths = make_widths(directory, BLOCKS)
  acc, speed, thresholds, t = {}, {}, [0.0] * BLOCKS, 0
  jit_refresh, jit_blocks, jit_forget = jax.jit(refresh), jax.jit(blocks_of), jax.jit(forget_free)
  histogram = np.zeros(BLOCKS + 1, int)
  for step in range(120):
    number = (rng.zipf(1.3, LANES) % 200 + step).astype(np.uint32)
    ids = Ids(jnp.stack([jnp.asarray(number)] * 2, axis=1), jnp.zeros(LANES, jnp.uint32))
    directory, claimed = fill(directory, ids, step=step)
    for n in number.tolist():
      acc.setdefault(n, 0.0)
      speed[n] = speed.get(n, 0) + 1
    blocks = np.asarray(jit_blocks(directory, widths, claimed.row))
    for lane, n in enumerate(number.tolist()):
      before = acc[n] / (1 - BETA**t) if t else 0.0
      now = (BETA * acc[n] + (1 - BETA) * speed[n]) / (1 - BETA ** (t + 1))
      frequency = max(before, now)
      low, high = (sum(frequency * scale >= x for x in thresholds) for scale in (1 - 1e-5, 1 + 1e-5))
      assert low <= blocks[lane] <= high
      histogram[blocks[lane]] += t > 0
    if step % 9 == 8:
      t += 1
      acc = {n: BETA * a + (1 - BETA) * speed[n] for n, a in acc.items()}
      speed = dict.fromkeys(acc, 0)
      ranked = sorted((a / (1 - BETA**t) for a in acc.values() if a > 1e-6), reverse=True)
      shares = [(P ** (BLOCKS + 1 - k) - 1) / (P ** (BLOCKS + 1) - 1) for k in range(1, BLOCKS + 1)]
      thresholds = [ranked[int(np.float32(share) * np.float32(len(ranked)))] for share in shares]
      widths = jit_refresh(directory, widths)
      np.testing.assert_allclose(widths.least, thresholds, rtol=1e-5)
    if step % 20 == 19:
      entries = directories.entries(directory)
      gone = np.asarray(step - entries.version > 10) & (np.asarray(entries.frequency) > 0)
      for row in np.flatnonzero(gone):
        n = int(entries.ids.key[row, 0])
        del acc[n], speed[n]
      directory = directories.evict(directory, jnp.asarray(gone))
      widths = jit_forget(directory, widths)
  assert (histogram > 0).all()


def test_no_row_and_ids_before_the_first_period_have_all_blocks():
  directory = make_directory(512)
  assert blocks_of(directory, make_widths(directory, 3), jnp.array([5, 512, 600])).tolist() == [3, 3, 3]


def test_mask():
  np.testing.assert_array_equal(
    mask(jnp.array([0, 1, 2, 3]), 3, 6), [[0] * 6, [1] * 2 + [0] * 4, [1] * 4 + [0] * 2, [1] * 6]
  )
  with pytest.raises(ValueError, match='3 blocks'):
    mask(jnp.array([0]), 3, 16)
