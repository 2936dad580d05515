"""A training step of a table: gradients of looked-up vectors -> gradients of rows -> new value and slots."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from dlrm_jax.optim.rowwise import CHUNK, update_distinct
from dlrm_jax.structs import Table


def merge_lanes(
  scratch: Int32[Array, 'rows'], row: Int32[Array, 'N'], grad: Float[Array, 'N D']
) -> tuple[Int32[Array, 'rows'], Int32[Array, 'K'], Float[Array, 'K D'], Int32[Array, '']]:
  """The distinct rows of a batch, the sum of the gradients of each, and their count; first, the used scratch.

  The distinct rows fill the first lanes; the others are "no row" with gradient 0. K is N, or above CHUNK the next
  multiple of it.

  Without a sort, which would cost more than the rest of the update: each lane writes its number at its row, so that
  reading there names one winner per row. Only places just written are read, so the scratch need not be cleared and
  what it held does not matter.
  """
  n, rows = row.shape[0], scratch.shape[0]
  k = n if n <= CHUNK else -(-n // CHUNK) * CHUNK
  lane = jnp.arange(n, dtype=jnp.int32)
  # A row past the end, or a negative one, wins nothing, so that nothing below ever sees it.
  scratch = scratch.at[row].set(lane, mode='drop', wrap_negative_indices=False)
  winner = scratch.at[row].get(mode='fill', fill_value=n, wrap_negative_indices=False)
  wins = (winner == lane).astype(jnp.int32)
  place = (jnp.cumsum(wins) - 1).at[winner].get(mode='fill', fill_value=k)
  distinct = jnp.full(k, rows, jnp.int32).at[place].set(row, mode='drop')
  total = jnp.zeros((k, grad.shape[1]), grad.dtype).at[place].add(grad, mode='drop')
  return scratch, distinct, total, jnp.sum(wins, dtype=jnp.int32)


def update_rows(
  tx: optax.GradientTransformation,
  table: Table,
  row: Int32[Array, 'N'],
  grad: Float[Array, 'N D'],
  l2: float | Float[Array, ''] = 0.0,
) -> Table:
  """The table after one step of `tx` on the rows that the batch touched. Donate the table, or it is copied.

  Args:
    tx: an element-wise transformation; `table.slots` come from `init_slots` with it.
    table: the table.
    row: the row of each lookup, duplicates welcome; outside of [0, rows): no row. A lookup of a padding example
      (weight 0) must come as "no row": a row counts as touched even if its gradient is 0.
    grad: gradient with respect to the looked-up vectors.
    l2: l2 times the row is added to the gradient of a touched row, once a step however often it was looked up.

  Shared slots advance once a call, even if no row is touched.
  """
  scratch, distinct, total, count = merge_lanes(table.scratch, row, grad)
  value, slots = update_distinct(tx, table.value, table.slots, distinct, total, count, l2)
  return table.replace(value=value, slots=slots, scratch=scratch)


def update_all(
  tx: optax.GradientTransformation,
  table: Table,
  row: Int32[Array, 'N'],
  grad: Float[Array, 'N D'],
  l2: float | Float[Array, ''] = 0.0,
) -> Table:
  """As `update_rows`, but `tx` sees every row, untouched ones with gradient 0: stock TensorFlow's Adam on a Variable.

  Costs several passes over the whole table. `l2` still acts on touched rows only.
  """
  at_row = {'mode': 'drop', 'wrap_negative_indices': False}
  touched = jnp.zeros((table.value.shape[0], 1), bool).at[row].set(True, **at_row)
  total = jnp.zeros_like(table.value).at[row].add(grad, **at_row) + l2 * jnp.where(touched, table.value, 0)
  updates, slots = tx.update(total, table.slots, table.value)
  return table.replace(value=optax.apply_updates(table.value, updates), slots=slots)


# How an optimizer meets a table, by the names of config.optimizer.table_update.
UPDATES = {'touched': update_rows, 'all': update_all}
