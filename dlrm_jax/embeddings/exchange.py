"""Lookups and gradients by all-to-all: each goes to the one device that has its row, and only there.

With `gather`, every device sees every other's lookups, so its work grows with their number. Here equal lookups of a
device meet first, so that what many ask for is asked for once; then each owner gets a box of fixed size, and what does
not fit goes in a further round, until nothing is left. The work of a device does not grow with the devices. Results
repeat to the bit, and are those of `gather` where devices have a power of two of leaves (sums.py) each, else but for
rounding. Rows of embedding variables are the same as with `gather`: an owner sees its ids in the same order.

What a device tells each owner in the first round, and with it how many rounds it needs, is all that the owner must know
to answer: vectors and gradients are boxes in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, UInt32

from dlrm_jax.embeddings.directory import Ids, owner_of
from dlrm_jax.native.exchange import ExchangeKernels
from dlrm_jax.sharding import Axis, after, packed
from dlrm_jax.structs import Table
from dlrm_jax.sums import LEAF

SELDOM = 'further_rounds'  # in the names of operations that most steps leave out


class Route(NamedTuple):
  """The way of a device's K lookups in one table: to the owners of what they look up, which are K things at most."""

  place: Int32[Array, 'B columns']  # of what each lookup looks up among these things; K: nothing
  row: Int32[Array, 'K']  # of each in the owner's part of the table; its size: no row
  owner: Int32[Array, 'K']  # ascending; the number of devices: nobody
  start: Int32[Array, 'devices+1']  # the first of each owner's, and how many there are in all
  rounds: Int32[Array, '']  # until all devices have sent everything
  # What the devices ask of this one in the first round: rows of its part of the table; its size: no row.
  asked: Int32[Array, 'N']


class Distinct(NamedTuple):
  """The ids that a device's K lookups look up, as a `Route` has them."""

  lane: Int32[Array, 'K']  # a lookup of each
  times: UInt32[Array, 'K']  # how many there are; 0: this is none


def capacity(lookups: int, devices: int) -> int:
  """Things in a box: 1.4 times the mean of Criteo-like examples; where there are more, there is a second round.

  Of the 13,312 lookups of 512 examples .36 are distinct, of those of 2048 .26, of 8192 .18: some 3.8 lookups ** .75.
  """
  return -(-min(lookups, round(5.3 * lookups**0.75)) // devices)


def route(axis: Axis, rows: int, row: Int32[Array, 'B columns'], kernels: ExchangeKernels) -> Route:
  """The way of lookups in a table of so many rows over all devices; that number or more: no row."""
  size, flat = rows // axis.size, row.reshape(-1)
  ids = Ids(flat[:, None].astype(jnp.uint32), jnp.zeros(flat.shape, jnp.uint32))
  way, distinct = _route(axis, ids, flat < rows, flat // size, kernels)
  local = jnp.where(distinct.times > 0, flat[distinct.lane] % size, size)
  return with_rows(axis, way._replace(place=way.place.reshape(row.shape)), local, size, kernels)


def route_ids(
  axis: Axis, ids: Ids, wanted: Bool[Array, 'K'], columns: int, kernels: ExchangeKernels
) -> tuple[Route, Distinct]:
  """The way of lookups of ids, `columns` of each example, in a directory that is cut. The owners know the rows."""
  way, distinct = _route(axis, ids, wanted, owner_of(ids, axis.size), kernels)
  return way._replace(place=way.place.reshape(-1, columns), rounds=axis.most(way.rounds)), distinct


def with_rows(axis: Axis, way: Route, row: Int32[Array, 'K'], none: int, kernels: ExchangeKernels) -> Route:
  """The way to these rows, which the owners are told; `none`: no row."""
  way = way._replace(row=row)
  boxes = _boxes(axis, way, 0, row, none, kernels).reshape(axis.size, -1)
  said = axis.swap(jnp.concatenate([boxes, jnp.broadcast_to(way.rounds, (axis.size, 1))], axis=1))
  return way._replace(asked=said[:, :-1].reshape(-1), rounds=said[:, -1].max())


def in_turn(where: Any, others: Any) -> Any:
  """A route that nothing takes before the others are there, see `sharding.after`; anything else as it is."""
  if not isinstance(where, Route):
    return where
  start, asked = after((where.start, where.asked), others)
  return where._replace(start=start, asked=asked)


def _route(
  axis: Axis, ids: Ids, wanted: Bool[Array, 'K'], owner: Int32[Array, 'K'], kernels: ExchangeKernels
) -> tuple[Route, Distinct]:
  """The way of lookups of ids with these owners, in as many rounds as this device needs; without rows.

  What has one owner stands in the order in which it first comes.
  """
  met, box = kernels.meet(*ids, jnp.where(wanted, owner, axis.size), axis.size), capacity(len(wanted), axis.size)
  rounds, none = (jnp.max(jnp.diff(met.start)) + box - 1) // box, jnp.zeros_like(met.lane)
  return Route(met.place, none, met.owner, met.start, rounds, none[:1]), Distinct(met.lane, met.times)


def lookup(
  axis: Axis, way: Route, size: int, read: Callable[[Array], Array], kernels: ExchangeKernels
) -> Float[Array, 'B columns D']:
  """Vectors of this device's lookups; no row reads as zero. `read` gives those of rows in a part of `size` rows."""

  def one_round(number: int | Array, asked: Array) -> Array:
    return kernels.rows.read(axis.swap(read(asked)), _slots_of_lookups(axis, way, number))

  def further(number: Array, vectors: Array) -> Array:
    return vectors + one_round(number, axis.swap(_boxes(axis, way, number, way.row, size, kernels)))

  vectors = one_round(0, way.asked)
  with jax.named_scope(SELDOM):
    return jax.lax.fori_loop(1, way.rounds, further, vectors)


def update(
  axis: Axis,
  way: Route,
  table: Table,
  gradient: Float[Array, 'B columns D'],
  apply: Callable[..., Table],
  kernels: ExchangeKernels,
) -> Table:
  """The table part after `apply(table, row i32[N], gradient f32[N, D], leaf=)` of what all devices have for its rows.

  Once, however many rounds there were: a row is updated by the sum of its gradients. What a device has is a leaf, being
  the sum of leaves: see `RowKernels.merge`.
  """
  flat, none, leaf = gradient.reshape(-1, gradient.shape[-1]), table.value.shape[0], LEAF * gradient.shape[1]
  places = axis.size * capacity(len(way.row), axis.size)

  def gradients(number: int | Array) -> Array:
    return axis.swap(kernels.add(_slots_of_lookups(axis, way, number).reshape(-1), flat, places, leaf))

  def send(number: Array) -> list[Array]:
    return [axis.swap(_boxes(axis, way, number, way.row, none, kernels)), gradients(number)]

  take = lambda table, received: (apply(table, *received, leaf=len(received[0]) // axis.size), ())
  return hand_over(axis, way, [way.asked, gradients(0)], send, (none, 0), table, take, ())[0]


def send_things(
  axis: Axis, way: Route, things: Sequence[Array], kernels: ExchangeKernels
) -> Callable[[int | Array], list[Array]]:
  """What sends a round of arrays [K, ...] of 32-bit numbers in one message, 0 for nothing: `hand_over`'s `send`."""
  together, apart = packed(things)
  return lambda number: apart(axis.swap(_boxes(axis, way, number, together, 0, kernels)))


def hand_over(
  axis: Axis,
  way: Route,
  first: Sequence[Array],
  send: Callable[[Array], Sequence[Array]],
  nothing: Sequence[int],
  state: Any,
  take: Callable[[Any, list[Array]], tuple[Any, Any]],
  empty: Any,
) -> tuple[Any, Any]:
  """The owners' new state, and their answers to this device: arrays [K, ...].

  Args:
    axis, way: between which devices, and how.
    first: what the devices have sent to this one in the first round: arrays [devices * box, ...], by device.
    send: sends a round, and gives what the devices have sent in it, like `first`.
    nothing: of each array, the number that stands where there is nothing.
    state: changed in place, if it may be.
    take: (state, received) -> (state, answers), called once with all that the devices have sent, arrays [N, ...]: by
      device, and then in the order of its `way`. N is that of `first`, or more where there is more than one round.
      Answers are arrays [N].
    empty: arrays [K] like the answers, for what has no owner.
  """
  box = capacity(len(way.row), axis.size)
  by_device = lambda part: part.reshape(axis.size, box, *part.shape[1:])

  def in_rounds(most: int, state: Any, zero: Array) -> tuple[Any, Any]:
    boxes = axis.size, most, box

    def receive(number: Array, held: list[Array]) -> list[Array]:
      return [all_.at[:, number].set(by_device(part)) for all_, part in zip(held, send(number), strict=True)]

    def answer(number: Array, held: Any) -> Any:
      slot = _slots(axis, way, number)
      back = lambda part: axis.swap(part.reshape(boxes)[:, number].reshape(-1)).at[slot].get(mode='clip')
      return jax.tree.map(lambda old, part: jnp.where(slot < axis.size * box, back(part), old), held, said)

    if most == 1:
      held = [by_device(part)[:, None] for part in first]
    else:
      full = [jnp.full((*boxes, *part.shape[1:]), none, part.dtype) for part, none in zip(first, nothing, strict=True)]
      # At a place that XLA does not know, or it would do this before the loop around it, which seldom runs.
      held = [all_.at[:, zero].set(by_device(part)) for all_, part in zip(full, first, strict=True)]
      held = jax.lax.fori_loop(1, way.rounds, receive, held)
    state, said = take(state, [part.reshape(-1, *part.shape[3:]) for part in held])
    return state, jax.lax.fori_loop(0, way.rounds, answer, empty)

  # One room for few rounds, one for as many as may be. Of these loops one runs, once: a `cond` would copy the state.
  def run_if(wanted: Array, most: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
    return jax.lax.fori_loop(0, wanted.astype(jnp.int32), lambda zero, carry: in_rounds(most, carry[0], zero), carry)

  carry = run_if(way.rounds <= 1, 1, (state, empty))
  with jax.named_scope(SELDOM):
    carry = run_if(way.rounds == 2, 2, carry)
    return run_if(way.rounds > 2, -(-len(way.row) // box), carry)


def by_lookup(way: Route, values: Array, nothing: int = 0) -> Array:
  """[B, columns, ...] of values [K, ...]."""
  return values.at[way.place].get(mode='fill', fill_value=nothing)


def _slots(axis: Axis, way: Route, number: int | Array) -> Int32[Array, 'K']:
  """Where the things of a round stand in the boxes of all owners; past the end: not in this round."""
  box = capacity(len(way.row), axis.size)
  rank = jnp.arange(len(way.row), dtype=jnp.int32) - way.start[way.owner]
  now = (rank // box == number) & (way.owner < axis.size)
  return jnp.where(now, way.owner * box + rank % box, axis.size * box)


def _slots_of_lookups(axis: Axis, way: Route, number: int | Array) -> Int32[Array, 'B columns']:
  """Where what each lookup looks up stands in these boxes."""
  return by_lookup(way, _slots(axis, way, number), axis.size * capacity(len(way.row), axis.size))


def _boxes(axis: Axis, way: Route, number: int | Array, values: Array, empty: int, kernels: ExchangeKernels) -> Array:
  """The values of a round, a box for each owner, one after another."""
  things, box = len(way.row), capacity(len(way.row), axis.size)
  thing = way.start[:-1, None] + number * box + jnp.arange(box, dtype=jnp.int32)[None]
  thing = jnp.where(thing < way.start[1:, None], thing, things).reshape(-1)
  boxes = kernels.rows.read(values, thing)
  return jnp.where(thing < things, boxes, empty) if empty else boxes
