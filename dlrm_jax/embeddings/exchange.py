"""Lookups and gradients by all-to-all: each goes to the one device that has its row, and only there.

With `gather`, every device sees every other's lookups, so its work grows with their number. Here equal lookups of a
device meet first, so that what many ask for is asked for once; then each owner gets a box of fixed size, and what does
not fit goes in a further round, until nothing is left. The work of a device does not grow with the devices; sums over
devices are in their order, so results repeat to the bit, and differ from those of `gather` by rounding alone. Rows of
embedding variables are the same as with `gather`: an owner sees its ids in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, UInt32

from dlrm_jax.embeddings.directory import Ids, claim, make_directory, owner_of, rows_of
from dlrm_jax.native.directory import DirectoryKernels
from dlrm_jax.sharding import Axis, after
from dlrm_jax.structs import Table

SELDOM = 'further_rounds'  # in the names of operations that most steps leave out


class Route(NamedTuple):
  """The way of a device's K lookups in one table: to the owners of what they look up, which are K things at most."""

  place: Int32[Array, 'B columns']  # of what each lookup looks up among these things; K: nothing
  row: Int32[Array, 'K']  # of each in the owner's part of the table; its size: no row
  owner: Int32[Array, 'K']  # ascending; the number of devices: nobody
  rank: Int32[Array, 'K']  # how many before it have the same owner
  rounds: Int32[Array, '']  # until all devices have sent everything


class Distinct(NamedTuple):
  """The ids that a device's K lookups look up, as a `Route` has them."""

  lane: Int32[Array, 'K']  # a lookup of each
  times: UInt32[Array, 'K']  # how many there are; 0: this is none


def capacity(lookups: int, devices: int) -> int:
  """Things in a box: the mean, if all were distinct. A third to a half are not, which leaves room for chance."""
  return -(-lookups // devices)


def route(axis: Axis, rows: int, row: Int32[Array, 'B columns'], kernels: DirectoryKernels) -> Route:
  """The way of lookups in a table of so many rows over all devices; that number or more: no row."""
  size, flat = rows // axis.size, row.reshape(-1)
  ids = Ids(jnp.stack([flat, flat], axis=1).astype(jnp.uint32), jnp.zeros(flat.shape, jnp.uint32))
  way, distinct = _route(axis, ids, flat < rows, flat // size, kernels)
  local = jnp.where(distinct.times > 0, flat[distinct.lane] % size, size)
  return way._replace(place=way.place.reshape(row.shape), row=local)


def route_ids(
  axis: Axis, ids: Ids, wanted: Bool[Array, 'K'], columns: int, kernels: DirectoryKernels
) -> tuple[Route, Distinct]:
  """The way of lookups of ids, `columns` of each example, in a directory that is cut. The owners know the rows."""
  way, distinct = _route(axis, ids, wanted, owner_of(ids, axis.size), kernels)
  return way._replace(place=way.place.reshape(-1, columns)), distinct


def in_turn(where: Any, others: Any) -> Any:
  """A route that nothing takes before the others are there, see `sharding.after`; anything else as it is."""
  return where._replace(rounds=after(where.rounds, others)) if isinstance(where, Route) else where


def _route(
  axis: Axis, ids: Ids, wanted: Bool[Array, 'K'], owner: Int32[Array, 'K'], kernels: DirectoryKernels
) -> tuple[Route, Distinct]:
  """The way of lookups of ids with these owners. What has one owner stands in the order in which it first comes.

  Equal ids meet in a small directory. Those that find no place there, which are few, stand there more than once.
  """
  lookups, nobody = len(wanted), axis.size
  directory, found = claim(make_directory(2 * lookups), ids, wanted, jnp.zeros((), jnp.int32), kernels)
  rows = rows_of(directory)
  alone = wanted & (found.row == rows)
  first = alone.at[found.fresh].set(True, mode='drop')
  lanes = jnp.arange(lookups, dtype=jnp.int32)
  # Both in one number, since XLA sorts one array five times as fast as two.
  order = jax.lax.sort(jnp.where(first, owner, nobody) * lookups + lanes)
  owner, lane = order // lookups, order % lookups
  place = jnp.zeros(lookups, jnp.int32).at[lane].set(lanes)
  place_of = jnp.zeros(rows, jnp.int32).at[jnp.where(first, found.row, rows)].set(place, mode='drop')
  place = jnp.where(alone, place, place_of.at[found.row].get(mode='fill', fill_value=lookups))
  times = jnp.zeros(lookups, jnp.uint32).at[place].add(jnp.uint32(1), mode='drop')
  start = jnp.searchsorted(owner, jnp.arange(nobody + 1)).astype(jnp.int32)
  rank, box = lanes - start[owner], capacity(lookups, axis.size)
  most = axis.most(jnp.max(jnp.where(owner < nobody, rank + 1, 0)))
  return Route(place, jnp.zeros_like(lane), owner, rank, (most + box - 1) // box), Distinct(lane, times)


def lookup(axis: Axis, way: Route, size: int, dim: int, read: Callable[[Array], Array]) -> Float[Array, 'B columns D']:
  """Vectors of this device's lookups; no row reads as zero. `read` gives those of rows in a part of `size` rows."""
  box = capacity(len(way.row), axis.size)

  def one_round(number: Array, vectors: Array) -> Array:
    slot = _slots(axis, way, box, number)
    asked = axis.swap(_boxes(axis, box, slot, way.row, size))
    return vectors + axis.swap(read(asked)).at[slot].get(mode='fill', fill_value=0)

  vectors = jax.lax.fori_loop(0, way.rounds, one_round, jnp.zeros((len(way.row), dim)))
  return by_lookup(way, vectors)


def update(
  axis: Axis,
  way: Route,
  table: Table,
  gradient: Float[Array, 'B columns D'],
  apply: Callable[[Table, Array, Array], Table],
) -> Table:
  """The table part after `apply(table, row i32[N], gradient f32[N, D])` of all that the devices have for its rows.

  Once, however many rounds there were: a row is updated by the sum of its gradients.
  """
  dim = gradient.shape[-1]
  summed = jnp.zeros((len(way.row), dim)).at[way.place.reshape(-1)].add(gradient.reshape(-1, dim), mode='drop')
  take = lambda table, received: (apply(table, *received), ())
  return hand_over(axis, way, [(way.row, table.value.shape[0]), (summed, 0)], table, take, ())[0]


def hand_over(
  axis: Axis,
  way: Route,
  sent: Sequence[tuple[Array, int]],
  state: Any,
  take: Callable[[Any, list[Array]], tuple[Any, Any]],
  empty: Any,
) -> tuple[Any, Any]:
  """The owners' new state, and their answers to this device: arrays [K, ...].

  Args:
    axis, way: between which devices, and how.
    sent: arrays [K, ...] of what is sent, each with the number that stands where there is nothing.
    state: changed in place, if it may be.
    take: (state, received) -> (state, answers), called once with all that the devices have sent, arrays [N, ...]: by
      device, and then in the order of its `way`. N is K, or more where there is more than one round. Answers are
      arrays [N].
    empty: arrays [K] like the answers, for what has no owner.
  """
  box = capacity(len(way.row), axis.size)

  def in_rounds(most: int, state: Any) -> tuple[Any, Any]:
    boxes = axis.size, most, box

    def receive(number: Array, held: list[Array]) -> list[Array]:
      slot = _slots(axis, way, box, number)
      one = [axis.swap(_boxes(axis, box, slot, values, none)) for values, none in sent]
      return [
        all_.at[:, number].set(part.reshape(axis.size, *all_.shape[2:])) for all_, part in zip(held, one, strict=True)
      ]

    def answer(number: Array, held: Any) -> Any:
      slot = _slots(axis, way, box, number)
      back = lambda part: axis.swap(part.reshape(boxes)[:, number].reshape(-1)).at[slot].get(mode='clip')
      return jax.tree.map(lambda old, part: jnp.where(slot < axis.size * box, back(part), old), held, said)

    held = [jnp.full((*boxes, *values.shape[1:]), none, values.dtype) for values, none in sent]
    held = jax.lax.fori_loop(0, way.rounds, receive, held)
    state, said = take(state, [part.reshape(-1, *part.shape[3:]) for part in held])
    return state, jax.lax.fori_loop(0, way.rounds, answer, empty)

  # Two loops, of which one runs, once: a `cond` would copy the state.
  one_round = (way.rounds <= 1).astype(jnp.int32)
  carry = jax.lax.fori_loop(0, one_round, lambda _, carry: in_rounds(1, carry[0]), (state, empty))
  with jax.named_scope(SELDOM):
    return jax.lax.fori_loop(0, 1 - one_round, lambda _, carry: in_rounds(-(-len(way.row) // box), carry[0]), carry)


def by_lookup(way: Route, values: Array, nothing: int = 0) -> Array:
  """[B, columns, ...] of values [K, ...]."""
  return values.at[way.place].get(mode='fill', fill_value=nothing)


def _slots(axis: Axis, way: Route, box: int, number: Array) -> Int32[Array, 'K']:
  """Where the things of a round stand in the boxes of all owners; past the end: not in this round."""
  now = (way.rank // box == number) & (way.owner < axis.size)
  return jnp.where(now, way.owner * box + way.rank % box, axis.size * box)


def _boxes(axis: Axis, box: int, slot: Array, values: Array, empty: int) -> Array:
  return jnp.full((axis.size * box, *values.shape[1:]), empty, values.dtype).at[slot].set(values, mode='drop')
