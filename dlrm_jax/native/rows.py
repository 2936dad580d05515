"""Reading, writing, merging and updating rows of tables, in XLA and in C++ (rows.cc, row_updates.cc): one promise.

"No row" is a number outside of [0, rows). Tables must be donated, or they are copied.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32, UInt32

Merged = tuple[Int32[Array, 'rows'], Int32[Array, 'K'], Float[Array, 'K D'], Int32[Array, '']]


class RowKernels(NamedTuple):
  """Either form. Tables [rows, ...] come as a tree, and their rows in a tree like it."""

  # (tables, row i32[...]) -> their rows [..., D]; no row reads as zero
  read: Callable[[Any, Array], Any]
  # (tables, row i32[K], new rows) -> tables; rows must be distinct, and no row is not written
  write: Callable[[Any, Array, Any], Any]
  # (scratch i32[rows], row i32[N], grad f32[N, D], K, leaf) -> (scratch, used; distinct rows i32[K]; the sum of the
  # gradients of each; their count). They fill the first lanes, in any order. The other lanes are "no row", with
  # gradients that mean nothing. K is at least N. What the scratch held is all one. In C++, of each `leaf` lanes the sum
  # is in the order of the batch, and all of it that of a tree over these (packing.h): where devices have leaves of
  # their own, the sum of their sums is the same.
  merge: Callable[[Array, Array, Array, int, int], Merged]
  # (name of an optimizer's rule, its numbers, (value f32[rows, D], slots), row i32[N], grad f32[N, D], l2, leaf) ->
  # value and slots after each distinct row was updated once, by the sum of its gradients and l2 times the row. None
  # where there is no such kernel: merge, read, any transformation and write do the same (optim/rowwise.py).
  update: Callable[[str, Sequence[float | Array], Any, Array, Array, float | Array, int], Any] | None


def xla_read(tables: Any, row: Int32[Array, '...']) -> Any:
  """See `RowKernels.read`."""
  at = {'mode': 'fill', 'fill_value': 0, 'wrap_negative_indices': False}
  return jax.tree.map(lambda table: table.at[row].get(**at), tables)


def xla_write(tables: Any, row: Int32[Array, 'K'], new: Any) -> Any:
  """See `RowKernels.write`."""
  at = {'mode': 'drop', 'wrap_negative_indices': False}
  return jax.tree.map(lambda table, rows: table.at[row].set(rows, **at), tables, new)


def xla_merge(
  scratch: Int32[Array, 'rows'], row: Int32[Array, 'N'], grad: Float[Array, 'N D'], places: int, leaf: int
) -> Merged:
  """See `RowKernels.merge`. Sums are in the order of the batch.

  Without a sort, which would cost more than the rest of the update: each lane writes its number at its row, so that
  reading there names one winner per row. Only places just written are read, so the scratch need not be cleared.
  """
  n, rows = row.shape[0], scratch.shape[0]
  lane = jnp.arange(n, dtype=jnp.int32)
  # A row past the end, or a negative one, wins nothing, so that nothing below ever sees it.
  scratch = scratch.at[row].set(lane, mode='drop', wrap_negative_indices=False)
  winner = scratch.at[row].get(mode='fill', fill_value=n, wrap_negative_indices=False)
  wins = (winner == lane).astype(jnp.int32)
  place = (jnp.cumsum(wins) - 1).at[winner].get(mode='fill', fill_value=places)
  distinct = jnp.full(places, rows, jnp.int32).at[place].set(row, mode='drop')
  total = jnp.zeros((places, grad.shape[1]), grad.dtype).at[place].add(grad, mode='drop')
  return scratch, distinct, total, jnp.sum(wins, dtype=jnp.int32)


def native_read(tables: Any, row: Int32[Array, '...']) -> Any:
  """See `RowKernels.read`."""
  leaves, tree = jax.tree.flatten(tables)
  shapes = [jax.ShapeDtypeStruct((*row.shape, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
  return jax.tree.unflatten(tree, jax.ffi.ffi_call('dlrm_rows_gather', shapes)(row, *leaves))


def native_write(tables: Any, row: Int32[Array, 'K'], new: Any) -> Any:
  """See `RowKernels.write`."""
  return in_place('dlrm_rows_scatter', (row,), tables, jax.tree.leaves(new))


def native_merge(
  scratch: Int32[Array, 'rows'], row: Int32[Array, 'N'], grad: Float[Array, 'N D'], places: int, leaf: int
) -> Merged:
  """See `RowKernels.merge`. The result does not depend on the number of threads."""
  shapes = (
    jax.ShapeDtypeStruct(scratch.shape, jnp.int32),
    jax.ShapeDtypeStruct((places,), jnp.int32),
    jax.ShapeDtypeStruct((places, grad.shape[1]), jnp.float32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  call = jax.ffi.ffi_call('dlrm_rows_merge', shapes, input_output_aliases={0: 0})
  return tuple(call(scratch, row, grad, leaf=leaf))


def native_update(
  rule: str,
  numbers: Sequence[float | Array],
  tables: Any,
  row: Int32[Array, 'N'],
  grad: Float[Array, 'N D'],
  l2: float | Float[Array, ''],
  leaf: int,
) -> Any:
  """See `RowKernels.update`. The result does not depend on the number of threads."""
  return in_place(f'dlrm_rows_{rule}', (row, grad, words(numbers), jnp.asarray(l2, jnp.float32)), tables, leaf=leaf)


def in_place(target: str, before: Sequence[Array], tables: Any, after: Sequence[Array] = (), **attributes: int) -> Any:
  """What a kernel, called with the leaves of the tables between other arguments, makes of the tables where they are."""
  leaves, tree = jax.tree.flatten(tables)
  aliases = {len(before) + place: place for place in range(len(leaves))}
  call = jax.ffi.ffi_call(target, leaves, input_output_aliases=aliases)
  return jax.tree.unflatten(tree, call(*before, *leaves, *after, **attributes))


def words(numbers: Sequence[float | Array]) -> UInt32[Array, 'n']:
  """Numbers as a struct of C++ has them, floating or whole."""

  def word(number: float | Array) -> Array:
    number = jnp.asarray(number)
    small = jnp.float32 if jnp.issubdtype(number.dtype, jnp.floating) else jnp.int32
    return jax.lax.bitcast_convert_type(number.astype(small), jnp.uint32)

  return jnp.stack([word(number) for number in numbers])


XLA = RowKernels(xla_read, xla_write, xla_merge, None)
NATIVE = RowKernels(native_read, native_write, native_merge, native_update)  # needs native.build.load()
