"""Which column's rows live where: one table for all columns (fusion) or one each, and where in a table a row stands."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32, UInt32

from dlrm_jax.spec import EmbeddingSpec

# A large table is cut into so many equal parts, and each device has as many of them as the next, if their number
# divides this one: 1 to 6, 8, 10, 12, 15, 16, 20, 24, 30, 32, 40, 48, 60, 64, 80, 96, ...
PARTS = 960
BLOCK = 64  # rows that stay together: the vectors of 16 numbers of one page of memory
STRIDE = 593  # PARTS / the golden ratio: a few blocks, one after another, are spread evenly over any number of devices


@dataclasses.dataclass(frozen=True)
class TableLayout:
  """One table: its columns (places in Batch.bucket) have their rows under each other in this order.

  In memory the rows of a table of several parts are dealt out to them in blocks, each part's turn coming once: without
  that, all columns of few buckets, which most lookups are for, would live on one device. So where a row stands depends
  on the table alone and not on the number of devices.
  """

  columns: tuple[int, ...]
  buckets: tuple[int, ...]  # of each of the columns
  parts: int = 1

  @property
  def rows(self) -> int:
    """Rows in memory, those included that fill up the last blocks; this number or a larger one means "no row"."""
    used = sum(self.buckets)
    return used if self.parts == 1 else -(-used // (self.parts * BLOCK)) * self.parts * BLOCK

  @property
  def offsets(self) -> np.ndarray:
    """First row of each column, before the rows are dealt out: i32[columns]."""
    return np.cumsum((0, *self.buckets[:-1])).astype(np.int32)

  def resolve(self, bucket: UInt32[Array, 'B F'], weight: Array) -> Int32[Array, 'B columns']:
    """Rows of a batch's buckets. Padding examples (weight 0) have no row, so that they touch nothing."""
    row = of_columns(bucket, self.columns).astype(jnp.int32) + self.offsets[None]
    return jnp.where(weight[:, None] > 0, self.dealt(row), self.rows)

  def dealt(self, row: Int32[Array, '...']) -> Int32[Array, '...']:
    """Where rows that are counted through the columns stand in memory."""
    if self.parts == 1:
      return row
    row = row.astype(jnp.uint32)  # several times as fast to divide, in every step
    block, inside = row // BLOCK, row % BLOCK
    part, turns = block % self.parts * STRIDE % self.parts, self.rows // BLOCK // self.parts
    return ((part * turns + block // self.parts) * BLOCK + inside).astype(jnp.int32)

  def origin(self, row: Int32[Array, 'N']) -> tuple[Int32[Array, 'N'], Int32[Array, 'N']]:
    """Whose rows stand at these places in memory: (column, bucket). What only fills up counts on in the last column."""
    if self.parts > 1:
      block, inside = row // BLOCK, row % BLOCK
      turns = self.rows // BLOCK // self.parts
      row = (block % turns * self.parts + block // turns * pow(STRIDE, -1, self.parts) % self.parts) * BLOCK + inside
    place = jnp.sum(row[:, None] >= self.offsets[None], axis=1) - 1
    return jnp.array(self.columns, jnp.int32)[place], row - jnp.asarray(self.offsets)[place]


def of_columns(x: Array, columns: tuple[int, ...]) -> Array:
  """What is [B, F, ...] for all columns, for some."""
  if columns == tuple(range(x.shape[1])):
    return x  # XLA would copy it
  return x[:, list(columns)]


def static_layout(spec: EmbeddingSpec) -> dict[str, TableLayout]:
  """The tables by name, in the order of their first columns; those of `spec.shard_mb` or more are of many parts."""

  def layout(columns: tuple[int, ...], buckets: tuple[int, ...]) -> TableLayout:
    large = sum(buckets) * spec.dim * 4 >= spec.shard_mb * 2**20
    return TableLayout(columns, buckets, PARTS if large else 1)

  columns = range(len(spec.buckets))
  if spec.fusion:
    return {'fused': layout(tuple(columns), spec.buckets)}
  return {f'C{column + 1}': layout((column,), (spec.buckets[column],)) for column in columns}
