"""Any element-wise optax transformation, lifted to the rows of a table that a batch touches.

In the slots of a table `[rows, D]`, leaves `[rows, ...]` are per row and leaves `[]` are shared by the table: the
latter advance once a training step, whatever rows are touched, so they do not depend on how tables are fused.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

# Rows updated at once: few enough that a chunk's gradients and slots stay in the second-level cache, many enough that
# the loop costs nothing. Anything from 1024 to 8192 is about as fast.
CHUNK = 2048


def init_slots(tx: optax.GradientTransformation, value: Float[Array, 'rows D']) -> Any:
  """The first slots of a table; ValueError if the transformation keeps anything that is neither per row nor shared."""
  slots = tx.init(value)
  for path, leaf in jax.tree_util.tree_leaves_with_path(slots):
    if leaf.ndim and leaf.shape[0] != value.shape[0]:
      raise ValueError(
        f'slot {jax.tree_util.keystr(path)} has shape {leaf.shape}; on a table of {value.shape[0]} rows it must be '
        f'[{value.shape[0]}, ...] or []: use a transformation that works element by element'
      )
  return slots


def update_distinct(
  tx: optax.GradientTransformation,
  value: Float[Array, 'rows D'],
  slots: Any,
  row: Int32[Array, 'K'],
  grad: Float[Array, 'K D'],
  count: Int32[Array, ''],
  l2: float | Float[Array, ''] = 0.0,
) -> tuple[Float[Array, 'rows D'], Any]:
  """New value and slots after `tx` saw the first `count` lanes; shared slots advance once, even if `count` is 0.

  Rows must be distinct in those lanes and past the end ("no row", nothing is written) in the others. K must be at
  most `CHUNK` or a multiple of it. Time goes with `count`: neither the rows of the table nor the other lanes cost
  anything. `l2` times the row is added to the gradient.
  """
  size = min(CHUNK, row.shape[0])

  def update_chunk(i: Array, table: tuple[Array, Any]) -> tuple[Array, Any]:
    lane_row = jax.lax.dynamic_slice_in_dim(row, i * size, size)
    lane_grad = jax.lax.dynamic_slice_in_dim(grad, i * size, size)
    # 'clip' is the cheapest read that is defined for "no row"; what such a lane computes is dropped by the writes.
    old_value, old_slots = jax.tree.map(lambda leaf: leaf.at[lane_row].get(mode='clip') if leaf.ndim else leaf, table)
    # Every chunk starts from the shared slots of the last step, so however many chunks there are, they advance once.
    old_slots = jax.tree.map(lambda leaf, first: leaf if first.ndim else first, old_slots, slots)
    updates, new_slots = tx.update(lane_grad + l2 * old_value, old_slots, old_value)
    return jax.tree.map(
      lambda leaf, new: leaf.at[lane_row].set(new, mode='drop') if leaf.ndim else new,
      table,
      (optax.apply_updates(old_value, updates), new_slots),
    )

  chunks = jnp.maximum(1, (count + size - 1) // size)  # at least one, for the shared slots
  return jax.lax.fori_loop(0, chunks, update_chunk, (value, slots))
