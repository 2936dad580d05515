"""The tables of a model: first values, and columns in their order."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dlrm_jax import bits
from dlrm_jax.embeddings.directory import Ids
from dlrm_jax.embeddings.first_values import initial_vectors
from dlrm_jax.embeddings.layout import TableLayout
from dlrm_jax.optim.rowwise import init_slots
from dlrm_jax.sharding import ALONE, Axis
from dlrm_jax.structs import Table

Layout = dict[str, TableLayout]
# One pass of random numbers is this many rows: bounds the temporary memory of a start beside tables of any size.
INIT_ROWS = 1 << 18


def init_table(
  layout: TableLayout,
  dim: int,
  tx: optax.GradientTransformation,
  seed: int,
  dtype: str = 'float32',
  axis: Axis = ALONE,
) -> Table:
  """A device's part of a new table: rows are normal with standard deviation 1/sqrt(dim), cut at two of them.

  They are a function of (seed, column, bucket): the same however columns are fused and tables are cut. With dtype
  bfloat16, value and slots are kept as bits (bits.py). Jit it.
  """
  rows = layout.rows // axis.size
  size, first = min(INIT_ROWS, rows), axis.index() * rows

  def fill(i: Array, value: Array) -> Array:
    start = jnp.minimum(i * size, rows - size)  # the last pass does some rows again
    column, bucket = layout.origin(first + start + jnp.arange(size, dtype=jnp.int32))
    ids = Ids(jnp.stack([bucket, jnp.zeros_like(bucket)], axis=1).astype(jnp.uint32), column.astype(jnp.uint32))
    return jax.lax.dynamic_update_slice(value, bits.stored(initial_vectors(seed, ids, dim), dtype), (start, 0))

  empty = jnp.zeros((rows, dim), jnp.uint16 if dtype == 'bfloat16' else jnp.float32)
  value = jax.lax.fori_loop(0, -(-rows // size), fill, empty)
  return Table(value=value, slots=init_slots(tx, value), scratch=jnp.zeros(rows, jnp.int32))


def in_order(layout: Layout, parts: dict[str, Array]) -> Array:
  """What is [B, columns, ...] for each table as [B, F, ...], columns in natural order C1, C2, ..."""
  if len(parts) == 1:
    return next(iter(parts.values()))
  order = [column for table in layout.values() for column in table.columns]
  places = sorted(range(len(order)), key=order.__getitem__)
  return jnp.concatenate(list(parts.values()), axis=1)[:, jnp.array(places)]
