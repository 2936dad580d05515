"""A training step of a table: gradients of looked-up vectors -> gradients of rows -> new value and slots."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from dlrm_jax.native.rows import XLA, RowKernels
from dlrm_jax.optim.rowwise import CHUNK, join, split, update_distinct
from dlrm_jax.optim.rules import WithRule
from dlrm_jax.structs import Table


def update_rows(
  tx: optax.GradientTransformation,
  table: Table,
  row: Int32[Array, 'N'],
  grad: Float[Array, 'N D'],
  l2: float | Float[Array, ''] = 0.0,
  kernels: RowKernels = XLA,
  step: int | Int32[Array, ''] = 0,
  first: int | Int32[Array, ''] = 0,
  leaf: int = 0,
) -> Table:
  """The table after one step of `tx` on the rows that the batch touched. Donate the table, or it is copied.

  Args:
    tx: an element-wise transformation; `table.slots` come from `init_slots` with it.
    table: the table.
    row: the row of each lookup, duplicates welcome; outside of [0, rows): no row. A lookup of a padding example
      (weight 0) must come as "no row": a row counts as touched even if its gradient is 0.
    grad: gradient with respect to the looked-up vectors.
    l2: l2 times the row is added to the gradient of a touched row, once a step however often it was looked up.
    kernels: what reads, writes and merges rows.
    step, first: number of the step, and of the first row in the whole of which this table is a device's part; only
      rounding needs them, where the table is stored as bits.
    leaf: lanes whose gradients are summed one after another, of more as `RowKernels.merge` says; 0: all.

  Shared slots advance once a call, even if no row is touched.
  """
  if kernels.update and isinstance(tx, WithRule) and table.value.dtype == jnp.float32:
    return _by_rule(tx, table, row, grad, l2, functools.partial(kernels.update, leaf=leaf or len(row)))
  places = row.shape[0] if row.shape[0] <= CHUNK else -(-row.shape[0] // CHUNK) * CHUNK
  scratch, distinct, total, count = kernels.merge(table.scratch, row, grad, places, leaf or len(row))
  value, slots = update_distinct(tx, table.value, table.slots, distinct, total, count, l2, kernels, step, first)
  return table.replace(value=value, slots=slots, scratch=scratch)


def _by_rule(
  tx: WithRule,
  table: Table,
  row: Int32[Array, 'N'],
  grad: Float[Array, 'N D'],
  l2: float | Float[Array, ''],
  update: Callable[..., Any],
) -> Table:
  per_row, shared = split(table.slots)
  none = jax.tree.map(lambda leaf: leaf[:0], (table.value, per_row))
  # Of no row at all, all that comes back is how the shared slots advance.
  _, advanced = tx.update(none[0], join(none[1], shared), none[0])
  value, per_row = update(tx.rule.name, tx.rule.numbers(table.slots), (table.value, per_row), row, grad, l2)
  return table.replace(value=value, slots=join(per_row, split(advanced)[1]))


def update_all(
  tx: optax.GradientTransformation,
  table: Table,
  row: Int32[Array, 'N'],
  grad: Float[Array, 'N D'],
  l2: float | Float[Array, ''] = 0.0,
  kernels: RowKernels = XLA,
  step: int | Int32[Array, ''] = 0,
  first: int | Int32[Array, ''] = 0,
  leaf: int = 0,
) -> Table:
  """As `update_rows`, but `tx` sees every row, untouched ones with gradient 0: stock TensorFlow's Adam on a Variable.

  Costs several passes over the whole table; it must be float32. `l2` still acts on touched rows only.
  """
  del step, first
  scratch, distinct, sums, _ = kernels.merge(table.scratch, row, grad, len(row), leaf or len(row))
  touched = jnp.zeros((table.value.shape[0], 1), bool).at[distinct].set(True, mode='drop')
  total = jnp.zeros_like(table.value).at[distinct].set(sums, mode='drop') + l2 * jnp.where(touched, table.value, 0)
  updates, slots = tx.update(total, table.slots, table.value)
  return table.replace(value=optax.apply_updates(table.value, updates), slots=slots, scratch=scratch)


# How an optimizer meets a table, by the names of config.optimizer.table_update.
UPDATES = {'touched': update_rows, 'all': update_all}
