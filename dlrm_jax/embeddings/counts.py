"""What became of lookups and ids, column by column."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, UInt32

from dlrm_jax.embeddings.admission import Resolved
from dlrm_jax.embeddings.directory import Ids
from dlrm_jax.embeddings.first_values import CHUNK, take
from dlrm_jax.structs import Counts


def no_counts(columns: int) -> Counts:
  """Before the first lookup, of a table with so many columns."""
  # Five arrays, not one five times: a step writes into each of them.
  zeros = (jnp.zeros(columns, jnp.uint32) for _ in range(5))
  return Counts(*zeros, asked=jnp.zeros((2, columns), jnp.uint32))


def lookups_of(columns: int, wanted: Bool[Array, 'N'], refused: Bool[Array, 'N'], unplaced: Bool[Array, 'N']) -> Counts:
  """What lookups add to the counts: example by example, each with all columns of the table. What is not wanted is not
  counted."""
  number = lambda lanes: jnp.sum(lanes.reshape(-1, columns), axis=0, dtype=jnp.uint32)
  return no_counts(columns).replace(lookups=number(wanted), refused=number(refused), unplaced=number(unplaced))


def admitted_of(columns: tuple[int, ...], ids: Ids, found: Resolved) -> UInt32[Array, 'columns']:
  """How many ids got a row. Costs time for these alone: after a while, few ids are new."""
  fresh, count = found.fresh, found.count
  lanes = jnp.pad(fresh, (0, -len(fresh) % CHUNK), constant_values=len(fresh))

  def add(i: Array, sums: Array) -> Array:
    lane = jax.lax.dynamic_slice_in_dim(lanes, i * CHUNK, CHUNK)
    here = (lane < len(fresh))[:, None] & (take(ids, lane).feature[:, None] == jnp.array(columns, jnp.uint32)[None])
    return sums + jnp.sum(here, axis=0, dtype=jnp.uint32)

  return jax.lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, add, jnp.zeros(len(columns), jnp.uint32))
