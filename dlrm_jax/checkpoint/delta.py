"""A checkpoint of what changed since the last whole one: of tables only the rows that differ, with their numbers.

Which they are is told by digests of all rows, kept since the whole checkpoint: no step has to remember what it touched,
and whatever changes a row, in a table of whatever kind, is seen. All that is not a table's row is saved as it is.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jaxtyping import UInt32

from dlrm_jax.checkpoint.digest import first_row, row_digests
from dlrm_jax.words import mix

ROW = 'row'  # beside a table's arrays in a delta: the numbers of the rows that it has of them, some perhaps twice
MOST = 0.25  # share of the rows from which on a whole checkpoint is worth its time

Tree = dict[str, Any]  # a state as `full.to_dict` has it


class Before(NamedTuple):
  """What is remembered of a state, to tell what changed since."""

  shapes: Any  # of all its arrays
  rows: dict[str, list[UInt32[Array, '2 rows']]]  # digests of the rows of each table on each device of this process


def remembered(tree: Tree) -> Before:
  """Of a state; of the tables that are small enough for several devices to have all of them, no rows."""
  return Before(jax.tree.map(np.shape, tree), _rows_of(tree['tables']))


def _rows_of(tables: dict[str, Any]) -> dict[str, list[Array]]:
  return {
    name: [_digests(parts) for parts in zip(*map(_parts_of, _per_row(table)), strict=True)]
    for name, table in tables.items()
    if _is_cut(table['value'])
  }


@jax.jit
def _digests(parts: Sequence[Array]) -> UInt32[Array, '2 rows']:
  """Of rows of several arrays; which array has which numbers counts."""
  return sum(mix(row_digests(part) ^ mix(jnp.uint32(place))) for place, part in enumerate(parts))


def changes(tree: Tree, before: Before) -> tuple[Tree, int] | None:
  """The state with only the rows of tables that differ from those before, and how many; waits for all processes.

  None where something has grown, or where as much has changed as a whole checkpoint is worth.
  """
  if jax.tree.map(np.shape, tree) != before.shapes:
    return None
  tables = tree['tables']
  changed = {name: list(map(_differing, parts, before.rows[name])) for name, parts in _rows_of(tables).items()}
  numbers = np.array([[max(map(len, rows)), sum(map(len, rows))] for rows in changed.values()], np.int32)
  numbers = multihost_utils.process_allgather(numbers.reshape(-1, 2))
  room = dict(zip(changed, map(_rounded, numbers[..., 0].max(axis=0).tolist()), strict=True))
  devices = {name: len(tables[name]['value'].sharding.device_set) for name in changed}
  if sum(room[name] * devices[name] for name in room) > MOST * sum(len(tables[name]['value']) for name in room):
    return None
  cut = {name: _cut(tables[name], rows, room[name]) for name, rows in changed.items()}
  return tree | {'tables': tables | cut}, int(numbers[..., 1].sum())


def _differing(now: Array, before: Array) -> np.ndarray:
  return np.flatnonzero((np.asarray(now) != np.asarray(before)).any(axis=0))


def _rounded(rows: int) -> int:
  """So many or up to an eighth more, since each number is another program to compile."""
  unit = 1 << max(rows.bit_length() - 4, 0)
  return max(-(-rows // unit) * unit, 1)


def _cut(table: dict[str, Any], rows: list[np.ndarray], room: int) -> dict[str, Any]:
  """A table with some of its rows, `room` of each device: where there are fewer, the first of them again."""
  value = table['value']
  padded = [np.concatenate([own, np.full(room - len(own), own[0] if len(own) else 0)]) for own in rows]
  shards = value.addressable_shards
  place = [jax.device_put(own.astype(np.int32), shard.device) for own, shard in zip(padded, shards, strict=True)]
  number = [own.astype(np.uint32) + np.uint32(first_row(shard)) for own, shard in zip(place, shards, strict=True)]

  def taken(leaf: Array) -> Array:
    return _joined(leaf, list(map(_take, _parts_of(leaf), place))) if _is_per_row(table, leaf) else leaf

  return jax.tree.map(taken, table) | {ROW: _joined(value, number)}


@jax.jit
def _take(part: Array, row: Array) -> Array:
  return part[row]


def _joined(like: Array, parts: list[Array]) -> Array:
  """The devices' parts as one array, which lies on them as another one does."""
  shape = len(like.sharding.device_set) * len(parts[0]), *parts[0].shape[1:]
  return jax.make_array_from_single_device_arrays(shape, like.sharding, parts)


def applied(table: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
  """A table with the rows of a delta, which every process has whole, in place of its own. The table is given up."""
  row = np.asarray(delta[ROW])

  def written(leaf: Array, new: Any) -> Array:
    if not _is_per_row(table, leaf):
      return new
    parts = []
    for shard in leaf.addressable_shards:
      first = first_row(shard)
      own = (row >= first) & (row < first + len(shard.data))
      place = (row[own] - np.uint32(first)).astype(np.int32)
      parts.append(_write(shard.data, *jax.device_put((place, np.asarray(new)[own]), shard.device)))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)

  return jax.tree.map(written, table, {name: part for name, part in delta.items() if name != ROW})


@functools.partial(jax.jit, donate_argnums=0)
def _write(part: Array, row: Array, new: Array) -> Array:
  return part.at[row].set(new)


def _per_row(table: dict[str, Any]) -> list[Array]:
  return [leaf for leaf in jax.tree.leaves(table) if _is_per_row(table, leaf)]


def _is_per_row(table: dict[str, Any], leaf: Array) -> bool:
  return leaf.ndim > 0 and len(leaf) == len(table['value'])


def _is_cut(value: Array) -> bool:
  """Whether no other device has the same rows."""
  return len(value.sharding.device_set) == 1 or not value.sharding.is_fully_replicated


def _parts_of(leaf: Array) -> list[Array]:
  """What this process's devices have of an array, in their order."""
  return [shard.data for shard in leaf.addressable_shards]
