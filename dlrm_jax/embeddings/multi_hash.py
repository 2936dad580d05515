"""Tables shorter than the vocabulary: an id's vector is made of two rows, and no two ids of a column share both.

The rows of the id's remainder and of its quotient by one number m, where the id is its bucket (Shi et al. 2019,
arXiv:1909.02107). To everything else they are static tables of 52 columns, first the remainders of C1..C26, then the
quotients: they are begun, read, updated and saved as any others.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32, UInt32

from dlrm_jax.embeddings.layout import static_layout
from dlrm_jax.embeddings.static import Found, Static, Tables, Vocabularies
from dlrm_jax.spec import COLUMNS, EmbeddingSpec
from dlrm_jax.structs import Batch

# (row of the remainder, row of the quotient) -> vector. In a product the quotient's row is what its factor has beyond
# 1. So it begins as any other row does, and the first products spread as the rows of a static table do, where those of
# two such rows would be near 0; and l2 pulls the factor to 1.
OPERATIONS: dict[str, Callable[[Array, Array], Array]] = {
  'add': lambda remainder, quotient: remainder + quotient,
  'mul': lambda remainder, quotient: remainder * (1 + quotient),
  'concat': lambda remainder, quotient: jnp.concatenate([remainder, quotient], axis=-1),
}


class Split(NamedTuple):
  """How the ids of a column come to two rows: id mod `modulus` and id // `divisor`."""

  modulus: int
  divisor: int


def split_of(buckets: int, spec: EmbeddingSpec) -> Split:
  """The same number twice; or, in a column of few buckets and where it would save no row, a remainder for each id.

  Their quotient is then one row for all of the column; of concat, whose vectors would have lost half of their width, it
  is a row for each id too.
  """
  options = spec.multi_hash
  m = options.remainder_rows or math.isqrt(buckets - 1) + 1
  if buckets >= options.full_below and m + -(-buckets // m) < buckets:
    return Split(m, m)
  return Split(buckets, 1 if options.operation == 'concat' else buckets)


def splits_of(spec: EmbeddingSpec) -> tuple[Split, ...]:
  """Those of C1..C26."""
  return tuple(split_of(buckets, spec) for buckets in spec.buckets)


def parts_of(spec: EmbeddingSpec) -> EmbeddingSpec:
  """The static tables whose rows are the parts of vectors: 52 columns, of half the width where they are joined."""
  splits = splits_of(spec)
  quotients = (-(-buckets // split.divisor) for buckets, split in zip(spec.buckets, splits, strict=True))
  dim = spec.dim // 2 if spec.multi_hash.operation == 'concat' else spec.dim
  return dataclasses.replace(spec, dim=dim, buckets=(*(split.modulus for split in splits), *quotients))


@dataclasses.dataclass(frozen=True)
class MultiHash(Static):
  """Two rows for an id. `spec` and `layout` are of the parts."""

  splits: tuple[Split, ...]  # of C1..C26

  def find(self, known: Vocabularies, batch: Batch) -> Found:
    """See `Static.find`."""
    return super().find(known, batch.replace(bucket=self.buckets(batch.bucket)))

  def buckets(self, bucket: UInt32[Array, 'B 26']) -> UInt32[Array, 'B 52']:
    """Those of the parts."""
    modulus, divisor = (jnp.array(numbers, jnp.uint32)[None] for numbers in zip(*self.splits, strict=True))
    return jnp.concatenate([bucket % modulus, bucket // divisor], axis=1)

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B 26 D']:
    """See `Static.lookup`."""
    return self.vectors(super().lookup(tables_, found))

  def vectors(self, parts: Float[Array, 'B 52 P']) -> Float[Array, 'B 26 D']:
    """What the parts come to."""
    return OPERATIONS[self.spec.multi_hash.operation](parts[:, :COLUMNS], parts[:, COLUMNS:])

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B 26 D'], step: Int32[Array, '']) -> Tables:
    """See `Static.update`. Each part gets its own gradient, by the parts before the step."""
    # Where gradients do not depend on the parts, the compiler leaves out that they are looked up once more.
    _, pull = jax.vjp(self.vectors, super().lookup(tables_, found))
    return super().update(tables_, found, *pull(gradient), step)


def multi_hash(spec: EmbeddingSpec, _: Any, *others: Any) -> MultiHash:
  """The tables of a spec; the layout is their own. `others` are as for `Static`."""
  parts = parts_of(spec)
  return MultiHash(parts, static_layout(parts), *others, splits_of(spec))
