"""Adaptive embedding: an id has a row of its own from its n-th sighting on (that is `admission.counter`), and before
that it shares a row of a static table. Its own row starts from the shared one."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from dlrm_jax.native.rows import XLA, RowKernels
from dlrm_jax.optim import bits
from dlrm_jax.optim.rowwise import Stored


def shared_rows(own: Bool[Array, '...'], hash_row: Int32[Array, '...'], hash_rows: int) -> Int32[Array, '...']:
  """Rows in the shared table of the lookups that have none of their own; "no row" for the others.

  So each lookup has a row in at most one of the tables, and as no row reads as zero, its vector is the sum of both.

  Args:
    own: which lookups have a row of their own.
    hash_row: of the shared table, for all lookups; padding has no row there either.
    hash_rows: of the shared table.
  """
  return jnp.where(own, hash_rows, hash_row)


def initial_from(
  value: Stored, hash_row: Int32[Array, 'N'], kernels: RowKernels = XLA
) -> Callable[[Int32[Array, 'K']], Float[Array, 'K D']]:
  """`initial` of `dynamic.start_rows`: the shared row of each lane."""

  def initial(lane: Int32[Array, 'K']) -> Float[Array, 'K D']:
    return bits.widen(kernels.read(value, hash_row.at[lane].get(mode='fill', fill_value=value.shape[0])))

  return initial
