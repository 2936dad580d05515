"""First values of the rows of embedding variables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.random import threefry2x32_p
from jaxtyping import Float, Int32

from dlrm_jax import bits
from dlrm_jax.embeddings.directory import Ids
from dlrm_jax.native.rows import XLA, RowKernels
from dlrm_jax.optim.rowwise import init_slots, join, split
from dlrm_jax.structs import Table

CHUNK = 1024  # rows that are begun at once


def make_table(rows: int, dim: int, tx: optax.GradientTransformation, dtype: str = 'float32') -> Table:
  """The table of an empty directory. Its rows are dead until they are claimed, so they may as well be zero."""
  value = jnp.zeros((rows, dim), jnp.uint16 if dtype == 'bfloat16' else jnp.float32)
  return Table(value=value, slots=init_slots(tx, value), scratch=jnp.zeros(rows, jnp.int32))


def initial_vectors(seed: int, ids: Ids, dim: int) -> Float[Array, 'N D']:
  """Normal with standard deviation 1/sqrt(dim), cut at two of them: a function of (seed, feature, key) alone."""
  # Threefry is keyed with the seed and what is drawn, and counts in keys: equal numbers only for equal ids.
  pairs = (len(ids.feature), -(-dim // 2))
  draw = ids.feature[:, None] + FEATURE_STRIDE * jnp.arange(pairs[1], dtype=jnp.uint32)[None]
  low, high = (jnp.broadcast_to(ids.key[:, half, None], pairs) for half in (0, 1))
  words = threefry2x32_p.bind(jnp.full(pairs, seed, jnp.uint32), draw, low, high)
  random = jnp.stack(words, axis=2).reshape(pairs[0], -1)[:, :dim]
  uniform = ((random >> 8).astype(jnp.float32) + 0.5) / (1 << 24)  # in (0, 1)
  edge = jax.lax.erf(jnp.float32(2**0.5))  # erf(2 / sqrt(2))
  return jax.lax.erf_inv((2 * uniform - 1) * edge) * (2 / dim) ** 0.5


FEATURE_STRIDE = 1 << 16


def start_rows(
  tx: optax.GradientTransformation,
  table: Table,
  row: Int32[Array, 'N'],
  fresh: Int32[Array, 'N'],
  count: Int32[Array, ''],
  initial: Callable[[Int32[Array, 'K']], Float[Array, 'K D']],
  kernels: RowKernels = XLA,
) -> Table:
  """The table with first values and slots in the rows of the first `count` of the `fresh` lanes.

  Args:
    tx: what the table's slots come from.
    table: donate it, or it is copied. Costs time for the new rows alone.
    row, fresh, count: as `admission.Resolved` has them.
    initial: lanes -> their first vectors. What it gives for lanes past the end is not used.
    kernels: what writes rows.
  """
  lanes = jnp.pad(fresh, (0, -len(fresh) % CHUNK), constant_values=len(row))
  per_row, shared = split((table.value, table.slots))  # slots that a whole table shares go on

  def start(i: Array, per_row: Any) -> Any:
    lane = jax.lax.dynamic_slice_in_dim(lanes, i * CHUNK, CHUNK)
    vectors = initial(lane)
    new, _ = split((vectors, tx.init(vectors)))
    new = jax.tree.map(lambda new, old: bits.to_nearest(new) if old.dtype == jnp.uint16 else new, new, per_row)
    at = row.at[lane].get(mode='fill', fill_value=table.value.shape[0])
    return kernels.write(per_row, at, new)

  value, slots = join(jax.lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, start, per_row), shared)
  return table.replace(value=value, slots=slots)


def take(ids: Ids, lane: Int32[Array, 'K']) -> Ids:
  """The ids of some lanes; zeros past the end."""
  return Ids(*(part.at[lane].get(mode='fill', fill_value=0) for part in ids))
