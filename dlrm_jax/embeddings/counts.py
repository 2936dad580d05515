"""What became of lookups and ids, column by column."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32, UInt32

from dlrm_jax.embeddings.admission import Resolved
from dlrm_jax.embeddings.directory import Ids
from dlrm_jax.embeddings.dynamic import CHUNK, take
from dlrm_jax.structs import Counts


def no_counts(columns: int) -> Counts:
  """Before the first lookup, of a table with so many columns."""
  # Five arrays, not one five times: a step writes into each of them.
  zeros = (jnp.zeros(columns, jnp.uint32) for _ in range(5))
  return Counts(*zeros, asked=jnp.zeros((2, columns), jnp.uint32))


def counted(columns: tuple[int, ...], ids: Ids, wanted: Bool[Array, 'N'], found: Resolved) -> Counts:
  """What one more batch adds to the counts. Its lookups stand as in `kinds.ids_of`: example by example, each with all
  columns of the table.

  A shard counts what it is given as wanted, so that the sum over shards that each want their own ids is the batch's.
  """
  number = lambda lanes: jnp.sum(lanes.reshape(-1, len(columns)), axis=0, dtype=jnp.uint32)
  return no_counts(len(columns)).replace(
    lookups=number(wanted),
    admitted=_admitted(jnp.array(columns, jnp.uint32), ids, found.fresh, found.count),
    refused=number(found.refused),
    unplaced=number(found.unplaced),
  )


def _admitted(
  columns: UInt32[Array, 'columns'], ids: Ids, fresh: Int32[Array, 'N'], count: Int32[Array, '']
) -> UInt32[Array, 'columns']:
  """The first `count` of the `fresh` lanes by column. Costs time for them alone: after a while, few ids are new."""
  lanes = jnp.pad(fresh, (0, -len(fresh) % CHUNK), constant_values=len(fresh))

  def add(i: Array, sums: Array) -> Array:
    lane = jax.lax.dynamic_slice_in_dim(lanes, i * CHUNK, CHUNK)
    here = (lane < len(fresh))[:, None] & (take(ids, lane).feature[:, None] == columns[None])
    return sums + jnp.sum(here, axis=0, dtype=jnp.uint32)

  return jax.lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, add, jnp.zeros_like(columns))
