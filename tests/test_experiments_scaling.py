"""The bytes of collectives, counted by hand."""

import jax
import jax.numpy as jnp

from dlrm_jax.sharding import CUT, WHOLE
from experiments import scaling
from tests.helpers import devices


def test_collectives_are_counted_with_their_bytes():
  axis = devices(4)

  def step(x, y):
    return axis.sum(x), axis.gather(y), axis.scatter_sum(jnp.tile(x, (4, 1))), axis.swap(jnp.tile(y, 8))

  over = axis.over(step, (CUT, CUT), (WHOLE, WHOLE, CUT, CUT))
  text = jax.jit(over).lower(jnp.ones((12, 5)), jnp.ones(8, jnp.int32)).compile().as_text()
  assert scaling.count(text) == {
    'all-reduce': {'times': 1, 'bytes': 3 * 5 * 4},
    'all-gather': {'times': 1, 'bytes': 8 * 4},
    'reduce-scatter': {'times': 1, 'bytes': 3 * 5 * 4},
    'all-to-all': {'times': 1, 'bytes': 16 * 4},
  }


def test_the_tables_have_every_run():
  rates = {'1': 100.0, '2': 180.0, '4': 200.0}
  text = scaling.render({
    'speed': {'bf16, 512': rates},
    'collectives': {'gather': {'2': {'all-reduce': {'times': 9, 'bytes': 2_000_000}}}},
  })
  assert '| bf16 | 512 | 100 | 180 | 200 | 1.80 | 1.11 |' in text
  assert '| gather | 2 | 9 x, 2.00 MB | 0 x, 0.00 MB |' in text
