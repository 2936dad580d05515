"""Which column's rows live where: one table for all columns (fusion) or one each."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32, UInt32

from dlrm_jax.spec import EmbeddingSpec


@dataclasses.dataclass(frozen=True)
class TableLayout:
  """One table: its columns (places in Batch.bucket) stand under each other in this order."""

  columns: tuple[int, ...]
  buckets: tuple[int, ...]  # of each of the columns

  @property
  def rows(self) -> int:
    """Rows of the table; a row number this large or larger means "no row"."""
    return sum(self.buckets)

  @property
  def offsets(self) -> np.ndarray:
    """First row of each column, i32[columns]."""
    return np.cumsum((0, *self.buckets[:-1])).astype(np.int32)

  def resolve(self, bucket: UInt32[Array, 'B F'], weight: Array) -> Int32[Array, 'B columns']:
    """Rows of a batch's buckets. Padding examples (weight 0) have no row, so that they touch nothing."""
    row = bucket[:, list(self.columns)].astype(jnp.int32) + self.offsets[None]
    return jnp.where(weight[:, None] > 0, row, self.rows)


def static_layout(spec: EmbeddingSpec) -> dict[str, TableLayout]:
  """The tables by name, in the order of their first columns."""
  columns = range(len(spec.buckets))
  if spec.fusion:
    return {'fused': TableLayout(tuple(columns), spec.buckets)}
  return {f'C{column + 1}': TableLayout((column,), (spec.buckets[column],)) for column in columns}
