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


@dataclasses.dataclass(frozen=True)
class TableLayout:
  """One table: its columns (places in Batch.bucket) have their rows under each other in this order.

  In memory the rows of a table of several parts are dealt out to them in blocks, one block to each in turn: without
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

  def resolve(self, bucket: UInt32[Array, 'B 26'], weight: Array) -> Int32[Array, 'B columns']:
    """Rows of a batch's buckets. Padding examples (weight 0) have no row, so that they touch nothing."""
    row = bucket[:, list(self.columns)].astype(jnp.int32) + self.offsets[None]
    return jnp.where(weight[:, None] > 0, self.dealt(row), self.rows)

  def dealt(self, row: Int32[Array, '...']) -> Int32[Array, '...']:
    """Where rows that are counted through the columns stand in memory."""
    if self.parts == 1:
      return row
    block, inside = row // BLOCK, row % BLOCK
    return (block % self.parts * (self.rows // BLOCK // self.parts) + block // self.parts) * BLOCK + inside

  def origin(self, row: Int32[Array, 'N']) -> tuple[Int32[Array, 'N'], Int32[Array, 'N']]:
    """Whose rows stand at these places in memory: (column, bucket). What only fills up counts on in the last column."""
    if self.parts > 1:
      block, inside = row // BLOCK, row % BLOCK
      turns = self.rows // BLOCK // self.parts
      row = (block % turns * self.parts + block // turns) * BLOCK + inside
    place = jnp.sum(row[:, None] >= self.offsets[None], axis=1) - 1
    return jnp.array(self.columns, jnp.int32)[place], row - jnp.asarray(self.offsets)[place]


def static_layout(spec: EmbeddingSpec) -> dict[str, TableLayout]:
  """The tables by name, in the order of their first columns; those of `spec.shard_mb` or more are of many parts."""

  def layout(columns: tuple[int, ...], buckets: tuple[int, ...]) -> TableLayout:
    large = sum(buckets) * spec.dim * 4 >= spec.shard_mb * 2**20
    return TableLayout(columns, buckets, PARTS if large else 1)

  columns = range(len(spec.buckets))
  if spec.fusion:
    return {'fused': layout(tuple(columns), spec.buckets)}
  return {f'C{column + 1}': layout((column,), (spec.buckets[column],)) for column in columns}
