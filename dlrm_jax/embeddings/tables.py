"""The tables of a model: first values, lookup of a batch, update by its gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, UInt32

from dlrm_jax.embeddings.layout import TableLayout
from dlrm_jax.native.rows import XLA, RowKernels
from dlrm_jax.optim import bits
from dlrm_jax.optim.rowwise import init_slots
from dlrm_jax.structs import Table

Layout = dict[str, TableLayout]
# One pass of random numbers is this many rows: bounds the temporary memory of a start beside tables of any size.
INIT_ROWS = 1 << 20


def init_table(
  layout: TableLayout, dim: int, tx: optax.GradientTransformation, seed: int, dtype: str = 'float32'
) -> Table:
  """A new table: each column's rows are normal with standard deviation 1/sqrt(dim), cut at two of them.

  They are a function of (seed, column, row in the column): the same however columns are fused.
  With dtype bfloat16, value and slots are kept as bits (optim/bits.py).
  """
  value = jnp.zeros((layout.rows, dim), jnp.uint16 if dtype == 'bfloat16' else jnp.float32)
  fill = jax.jit(_fill, static_argnums=(3,), donate_argnums=0)
  for column, buckets, offset in zip(layout.columns, layout.buckets, layout.offsets, strict=True):
    key = jax.random.fold_in(jax.random.key(seed), column)
    for block, start in enumerate(range(0, buckets, INIT_ROWS)):
      rows = min(INIT_ROWS, buckets - start)
      value = fill(value, jax.random.fold_in(key, block), offset + start, rows)
  slots = jax.jit(lambda value: init_slots(tx, value))(value)
  return Table(value=value, slots=slots, scratch=jnp.zeros(layout.rows, jnp.int32))


def _fill(value: Array, key: Array, start: Array, rows: int) -> Array:
  dim = value.shape[1]
  new = jax.random.truncated_normal(key, -2, 2, (rows, dim)) / dim**0.5
  if value.dtype == jnp.uint16:
    new = bits.to_nearest(new)
  return jax.lax.dynamic_update_slice(value, new, (start, 0))


def resolve(layout: Layout, bucket: UInt32[Array, 'B F'], weight: Float[Array, 'B']) -> dict[str, Array]:
  """Rows i32[B, columns] of a batch in each table."""
  return {name: table.resolve(bucket, weight) for name, table in layout.items()}


def lookup(
  layout: Layout, tables: dict[str, Table], rows: dict[str, Array], kernels: RowKernels = XLA
) -> Float[Array, 'B F D']:
  """Vectors of a batch, columns in natural order C1, C2, ...; no row reads as zero."""
  return in_order(layout, {name: bits.widen(kernels.read(tables[name].value, rows[name])) for name in layout})


def in_order(layout: Layout, parts: dict[str, Array]) -> Array:
  """What is [B, columns, ...] for each table as [B, F, ...], columns in natural order C1, C2, ..."""
  if len(parts) == 1:
    return next(iter(parts.values()))
  order = [column for table in layout.values() for column in table.columns]
  places = sorted(range(len(order)), key=order.__getitem__)
  return jnp.concatenate(list(parts.values()), axis=1)[:, jnp.array(places)]


def update(
  layout: Layout,
  step: Callable[[Table, Array, Array], Table],
  tables: dict[str, Table],
  rows: dict[str, Array],
  gradient: Float[Array, 'B F D'],
) -> dict[str, Table]:
  """The tables after `step(table, row[N], gradient[N, D])` saw the gradients of what was looked up in each."""
  return {
    name: step(
      tables[name], rows[name].reshape(-1), _of_columns(gradient, table.columns).reshape(-1, gradient.shape[-1])
    )
    for name, table in layout.items()
  }


def _of_columns(gradient: Array, columns: tuple[int, ...]) -> Array:
  if columns == tuple(range(gradient.shape[1])):
    return gradient  # XLA would copy it
  return gradient[:, jnp.array(columns)]
