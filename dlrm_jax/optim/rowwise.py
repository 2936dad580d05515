"""Any element-wise optax transformation, lifted to the rows of a table that a batch touches.

In the slots of a table `[rows, D]`, leaves `[rows, ...]` are per row and leaves `[]` are shared by the table: the
latter advance once a training step, whatever rows are touched, so they do not depend on how tables are fused.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, UInt16

from dlrm_jax import bits
from dlrm_jax.native.rows import XLA, RowKernels

# Rows updated at once: few enough that a chunk's gradients and slots stay in the second-level cache, many enough that
# the loop costs nothing. Anything from 1024 to 8192 is about as fast.
CHUNK = 2048

Stored = Float[Array, 'rows D'] | UInt16[Array, 'rows D']  # of a table: float32, or bfloat16 as its bits


def init_slots(tx: optax.GradientTransformation, value: Stored) -> Any:
  """The first slots of a table; ValueError if the transformation keeps anything that is neither per row nor shared.

  Where the value is stored as bits, so are the slots of float32.
  """
  slots = tx.init(bits.widen(value))
  for path, leaf in jax.tree_util.tree_leaves_with_path(slots):
    if leaf.ndim and leaf.shape[0] != value.shape[0]:
      raise ValueError(
        f'slot {jax.tree_util.keystr(path)} has shape {leaf.shape}; on a table of {value.shape[0]} rows it must be '
        f'[{value.shape[0]}, ...] or []: use a transformation that works element by element'
      )
  if value.dtype != jnp.uint16:
    return slots
  return jax.tree.map(lambda leaf: bits.to_nearest(leaf) if leaf.ndim and leaf.dtype == jnp.float32 else leaf, slots)


def update_distinct(
  tx: optax.GradientTransformation,
  value: Stored,
  slots: Any,
  row: Int32[Array, 'K'],
  grad: Float[Array, 'K D'],
  count: Int32[Array, ''],
  l2: float | Float[Array, ''] = 0.0,
  kernels: RowKernels = XLA,
  step: int | Int32[Array, ''] = 0,
  first: int | Int32[Array, ''] = 0,
) -> tuple[Stored, Any]:
  """New value and slots after `tx` saw the first `count` lanes; shared slots advance once, even if `count` is 0.

  Rows must be distinct in those lanes and past the end ("no row", nothing is written) in the others. K must be at
  most `CHUNK` or a multiple of it. Time goes with `count`: neither the rows of the table nor the other lanes cost
  anything. `l2` times the row is added to the gradient. Rounding at random, where the table is stored as
  bits, starts from `step`, the number of the step, and from the rows' numbers in the whole table, whose row `first` is
  the first one here.
  """
  size = min(CHUNK, row.shape[0])
  tables, shared = split((value, slots))

  def update_chunk(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
    tables, _ = carry
    lane_row = jax.lax.dynamic_slice_in_dim(row, i * size, size)
    lane_grad = jax.lax.dynamic_slice_in_dim(grad, i * size, size)
    # Every chunk starts from the shared slots of the last step, so however many chunks there are, they advance once.
    old_value, old_slots = join(bits.widen(kernels.read(tables, lane_row)), shared)
    updates, new_slots = tx.update(lane_grad + l2 * old_value, old_slots, old_value)
    new, new_shared = split((optax.apply_updates(old_value, updates), new_slots))
    new = bits.narrow(new, tables, lane_row + first, jnp.asarray(step, jnp.int32))
    return kernels.write(tables, lane_row, new), new_shared

  chunks = jnp.maximum(1, (count + size - 1) // size)  # at least one, for the shared slots
  return join(*jax.lax.fori_loop(0, chunks, update_chunk, (tables, shared)))


def split(tree: Any) -> tuple[Any, Any]:
  """Two trees like `tree`: of the leaves that are per row, and of those that are shared; None stands for the others."""
  per_row = jax.tree.map(lambda leaf: leaf if leaf.ndim else None, tree)
  return per_row, jax.tree.map(lambda leaf: None if leaf.ndim else leaf, tree)


def join(per_row: Any, shared: Any) -> Any:
  """What `split` took apart."""
  return jax.tree.map(lambda a, b: b if a is None else a, per_row, shared, is_leaf=lambda leaf: leaf is None)
