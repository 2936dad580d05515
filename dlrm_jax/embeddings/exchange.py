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

from dlrm_jax.embeddings.directory import Ids, owner_of
from dlrm_jax.native.exchange import ExchangeKernels
from dlrm_jax.sharding import Axis, after
from dlrm_jax.structs import Table

SELDOM = 'further_rounds'  # in the names of operations that most steps leave out


class Route(NamedTuple):
  """The way of a device's K lookups in one table: to the owners of what they look up, which are K things at most."""

  place: Int32[Array, 'B columns']  # of what each lookup looks up among these things; K: nothing
  row: Int32[Array, 'K']  # of each in the owner's part of the table; its size: no row
  owner: Int32[Array, 'K']  # ascending; the number of devices: nobody
  start: Int32[Array, 'devices+1']  # the first of each owner's, and how many there are in all
  rounds: Int32[Array, '']  # until all devices have sent everything


class Distinct(NamedTuple):
  """The ids that a device's K lookups look up, as a `Route` has them."""

  lane: Int32[Array, 'K']  # a lookup of each
  times: UInt32[Array, 'K']  # how many there are; 0: this is none


def capacity(lookups: int, devices: int) -> int:
  """Things in a box: the mean, if all were distinct. A third to a half are not, which leaves room for chance."""
  return -(-lookups // devices)


def route(axis: Axis, rows: int, row: Int32[Array, 'B columns'], kernels: ExchangeKernels) -> Route:
  """The way of lookups in a table of so many rows over all devices; that number or more: no row."""
  size, flat = rows // axis.size, row.reshape(-1)
  ids = Ids(flat[:, None].astype(jnp.uint32), jnp.zeros(flat.shape, jnp.uint32))
  way, distinct = _route(axis, ids, flat < rows, flat // size, kernels)
  local = jnp.where(distinct.times > 0, flat[distinct.lane] % size, size)
  return way._replace(place=way.place.reshape(row.shape), row=local)


def route_ids(
  axis: Axis, ids: Ids, wanted: Bool[Array, 'K'], columns: int, kernels: ExchangeKernels
) -> tuple[Route, Distinct]:
  """The way of lookups of ids, `columns` of each example, in a directory that is cut. The owners know the rows."""
  way, distinct = _route(axis, ids, wanted, owner_of(ids, axis.size), kernels)
  return way._replace(place=way.place.reshape(-1, columns)), distinct


def in_turn(where: Any, others: Any) -> Any:
  """A route that nothing takes before the others are there, see `sharding.after`; anything else as it is."""
  return where._replace(start=after(where.start, others)) if isinstance(where, Route) else where


def _route(
  axis: Axis, ids: Ids, wanted: Bool[Array, 'K'], owner: Int32[Array, 'K'], kernels: ExchangeKernels
) -> tuple[Route, Distinct]:
  """The way of lookups of ids with these owners. What has one owner stands in the order in which it first comes."""
  met, box = kernels.meet(*ids, jnp.where(wanted, owner, axis.size), axis.size), capacity(len(wanted), axis.size)
  rounds = (axis.most(jnp.max(jnp.diff(met.start))) + box - 1) // box
  return Route(met.place, jnp.zeros_like(met.lane), met.owner, met.start, rounds), Distinct(met.lane, met.times)


def lookup(
  axis: Axis, way: Route, size: int, read: Callable[[Array], Array], kernels: ExchangeKernels
) -> Float[Array, 'B columns D']:
  """Vectors of this device's lookups; no row reads as zero. `read` gives those of rows in a part of `size` rows."""

  def one_round(number: int | Array) -> Array:
    asked = axis.swap(_boxes(axis, way, number, way.row, size, kernels))
    return kernels.rows.read(axis.swap(read(asked)), _slots(axis, way, number))

  vectors = one_round(0)
  with jax.named_scope(SELDOM):
    vectors = jax.lax.fori_loop(1, way.rounds, lambda number, vectors: vectors + one_round(number), vectors)
  return kernels.rows.read(vectors, way.place)


def update(
  axis: Axis,
  way: Route,
  table: Table,
  gradient: Float[Array, 'B columns D'],
  apply: Callable[[Table, Array, Array], Table],
  kernels: ExchangeKernels,
) -> Table:
  """The table part after `apply(table, row i32[N], gradient f32[N, D])` of all that the devices have for its rows.

  Once, however many rounds there were: a row is updated by the sum of its gradients.
  """
  dim = gradient.shape[-1]
  summed = kernels.add(way.place.reshape(-1), gradient.reshape(-1, dim), len(way.row))
  take = lambda table, received: (apply(table, *received), ())
  return hand_over(axis, way, [(way.row, table.value.shape[0]), (summed, 0)], table, take, (), kernels)[0]


def hand_over(
  axis: Axis,
  way: Route,
  sent: Sequence[tuple[Array, int]],
  state: Any,
  take: Callable[[Any, list[Array]], tuple[Any, Any]],
  empty: Any,
  kernels: ExchangeKernels,
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
    kernels: what packs the boxes.
  """
  box = capacity(len(way.row), axis.size)

  def send(number: int | Array) -> list[Array]:
    swapped = [axis.swap(_boxes(axis, way, number, values, none, kernels)) for values, none in sent]
    return [part.reshape(axis.size, box, *part.shape[1:]) for part in swapped]

  first = send(0)

  def in_rounds(most: int, state: Any) -> tuple[Any, Any]:
    boxes = axis.size, most, box

    def receive(number: Array, held: list[Array]) -> list[Array]:
      return [all_.at[:, number].set(part) for all_, part in zip(held, send(number), strict=True)]

    def answer(number: Array, held: Any) -> Any:
      slot = _slots(axis, way, number)
      back = lambda part: axis.swap(part.reshape(boxes)[:, number].reshape(-1)).at[slot].get(mode='clip')
      return jax.tree.map(lambda old, part: jnp.where(slot < axis.size * box, back(part), old), held, said)

    held = [part[:, None] for part in first]
    if most > 1:
      full = [jnp.full((*boxes, *values.shape[1:]), none, values.dtype) for values, none in sent]
      held = [all_.at[:, :1].set(part) for all_, part in zip(full, held, strict=True)]
      held = jax.lax.fori_loop(1, way.rounds, receive, held)
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


def _slots(axis: Axis, way: Route, number: int | Array) -> Int32[Array, 'K']:
  """Where the things of a round stand in the boxes of all owners; past the end: not in this round."""
  box = capacity(len(way.row), axis.size)
  rank = jnp.arange(len(way.row), dtype=jnp.int32) - way.start[way.owner]
  now = (rank // box == number) & (way.owner < axis.size)
  return jnp.where(now, way.owner * box + rank % box, axis.size * box)


def _boxes(axis: Axis, way: Route, number: int | Array, values: Array, empty: int, kernels: ExchangeKernels) -> Array:
  """The values of a round, a box for each owner, one after another."""
  things, box = len(way.row), capacity(len(way.row), axis.size)
  thing = way.start[:-1, None] + number * box + jnp.arange(box, dtype=jnp.int32)[None]
  thing = jnp.where(thing < way.start[1:, None], thing, things).reshape(-1)
  boxes = kernels.rows.read(values, thing)
  return jnp.where(thing < things, boxes, empty) if empty else boxes
