"""Lookups and gradients by all-to-all: each goes to the one device that has its row, and only there.

With `gather`, every device sees every other's lookups, so its work grows with their number. Here equal rows of a device
meet first, so that one that many ask for is asked for once; then each owner gets a box of fixed size, and what does not
fit goes in a further round, until nothing is left. The work of a device does not grow with the devices; sums over
devices are in their order, so results repeat to the bit, and differ from those of `gather` by rounding alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from dlrm_jax.sharding import Axis
from dlrm_jax.structs import Table


class Route(NamedTuple):
  """The way of a device's lookups in one table; K of them, and at most as many distinct rows."""

  place: Int32[Array, 'B columns']  # of each lookup's row among the distinct ones
  row: Int32[Array, 'K']  # in the owner's part of the table; its size: no row
  owner: Int32[Array, 'K']  # the number of devices: nobody, for no row
  rank: Int32[Array, 'K']  # how many distinct rows before it have the same owner
  rounds: Int32[Array, '']  # until all devices have sent everything


def capacity(lookups: int, devices: int) -> int:
  """Rows of a box: the mean, if all rows were distinct. A third to a half are not, which leaves room for chance."""
  return -(-lookups // devices)


def route(axis: Axis, rows: int, row: Int32[Array, 'B columns']) -> Route:
  """The way of lookups in a table of so many rows over all devices; that number or more: no row."""
  lookups, devices, size = row.size, axis.size, rows // axis.size
  distinct, place = jnp.unique(row.reshape(-1), return_inverse=True, size=lookups, fill_value=rows)
  owner = jnp.minimum(distinct // size, devices)
  of_owner = owner[:, None] == jnp.arange(devices)[None]
  rank = jnp.sum(jnp.where(of_owner, jnp.cumsum(of_owner, axis=0, dtype=jnp.int32) - 1, 0), axis=1)
  most = axis.most(jnp.max(jnp.where(owner < devices, rank + 1, 0)))
  box = capacity(lookups, devices)
  local = jnp.where(owner < devices, distinct - owner * size, size)
  return Route(place.reshape(row.shape).astype(jnp.int32), local, owner, rank, (most + box - 1) // box)


def lookup(axis: Axis, way: Route, size: int, dim: int, read: Callable[[Array], Array]) -> Float[Array, 'B columns D']:
  """Vectors of this device's lookups; no row reads as zero. `read` gives those of rows in a part of `size` rows."""
  box = capacity(len(way.row), axis.size)

  def round_(number: Array, vectors: Array) -> Array:
    slot = _slots(axis, way, box, number)
    asked = axis.swap(_boxes(axis, box, slot, way.row, size))
    return vectors + axis.swap(read(asked)).at[slot].get(mode='fill', fill_value=0)

  vectors = jax.lax.fori_loop(0, way.rounds, round_, jnp.zeros((len(way.row), dim)))
  return vectors[way.place]


def update(
  axis: Axis, way: Route, size: int, gradient: Float[Array, 'B columns D'], apply: Callable[[Array, Array], Table]
) -> Table:
  """The table part after `apply(row i32[N], gradient f32[N, D])` of all that the devices have for its rows.

  Once, however many rounds there were: a row is updated by the sum of its gradients.
  """
  box, dim = capacity(len(way.row), axis.size), gradient.shape[-1]
  summed = jnp.zeros((len(way.row), dim)).at[way.place.reshape(-1)].add(gradient.reshape(-1, dim))

  def received(number: Array) -> tuple[Array, Array]:
    slot = _slots(axis, way, box, number)
    return axis.swap(_boxes(axis, box, slot, way.row, size)), axis.swap(_boxes(axis, box, slot, summed, 0))

  def many() -> Table:
    most = -(-len(way.row) // box)
    empty = jnp.full((most, axis.size * box), size), jnp.zeros((most, axis.size * box, dim))
    put = lambda number, held: jax.tree.map(lambda all_, one: all_.at[number].set(one), held, received(number))
    row, grad = jax.lax.fori_loop(0, way.rounds, put, empty)
    return apply(row.reshape(-1), grad.reshape(-1, dim))

  return jax.lax.cond(way.rounds > 1, many, lambda: apply(*received(jnp.zeros((), jnp.int32))))


def _slots(axis: Axis, way: Route, box: int, number: Array) -> Int32[Array, 'K']:
  """Where the distinct rows of a round stand in the boxes of all owners; past the end: not in this round."""
  now = (way.rank // box == number) & (way.owner < axis.size)
  return jnp.where(now, way.owner * box + way.rank % box, axis.size * box)


def _boxes(axis: Axis, box: int, slot: Array, values: Array, empty: int) -> Array:
  return jnp.full((axis.size * box, *values.shape[1:]), empty, values.dtype).at[slot].set(values, mode='drop')
