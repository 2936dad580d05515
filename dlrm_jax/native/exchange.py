"""What a device does with its lookups before they go to the owners of their rows, in XLA and in C++ (exchange.cc)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32, UInt32

from dlrm_jax.native import rows
from dlrm_jax.native.rows import RowKernels

SALTS = (0x7FEB352D, 0x846CA68B, 0x9E3779B1)  # odd numbers, of which each makes another hash


class Met(NamedTuple):
  """The distinct ids of K lookups: by owner, and then in the order in which they come. They are K at most."""

  place: Int32[Array, 'K']  # of each lookup's id among them; K: none
  start: Int32[Array, 'devices+1']  # the first of each owner's, and how many there are in all
  owner: Int32[Array, 'K']  # of each id, ascending; the number of devices: nobody, and there is no more id
  lane: Int32[Array, 'K']  # the first lookup of it
  times: UInt32[Array, 'K']  # how many there are; 0: no id


class ExchangeKernels(NamedTuple):
  """Either form."""

  # (key u32[K, W], feature u32[K], owner i32[K], devices) -> Met. Lookups with `devices` as owner look up nothing. In
  # XLA, ids that share their hash with others may stand more than once, each time for some of their lookups.
  meet: Callable[[Array, Array, Array, int], Met]
  # (place i32[N], values f32[N, D], K, leaf) -> f32[K, D]: of each place the sum of the values there; K: nowhere. The
  # leaf is as in `RowKernels.merge`.
  add: Callable[[Array, Array, int, int], Array]
  rows: RowKernels


def xla_meet(key: UInt32[Array, 'K W'], feature: UInt32[Array, 'K'], owner: Int32[Array, 'K'], devices: int) -> Met:
  """See `ExchangeKernels.meet`."""
  lookups = len(owner)
  lanes = jnp.arange(lookups, dtype=jnp.int32)
  leader, unled, size = lanes, owner < devices, 4 * lookups
  for salt in SALTS:
    # Of the ids with one hash, the one that comes first leads its lookups; the others try another hash.
    hashed = feature
    for word in key.T:
      hashed = (hashed ^ word) * jnp.uint32(salt)
      hashed ^= hashed >> 15
    hashed = (hashed % size).astype(jnp.int32)
    first = jnp.full(size, lookups, jnp.int32).at[jnp.where(unled, hashed, size)].min(lanes, mode='drop')[hashed]
    at = lambda values, first=first: values.at[first].get(mode='clip')
    led = unled & (at(key) == key).all(axis=1) & (at(feature) == feature)
    leader, unled = jnp.where(led, first, leader), unled & ~led
  leads = (owner < devices) & (leader == lanes)
  # Both in one number, since XLA sorts one array five times as fast as two.
  order = jax.lax.sort(jnp.where(leads, owner, devices) * lookups + lanes)
  place = jnp.zeros(lookups, jnp.int32).at[order % lookups].set(lanes)[leader]
  place = jnp.where(owner < devices, place, lookups)
  owner, lane = order // lookups, order % lookups
  start = jnp.searchsorted(owner, jnp.arange(devices + 1)).astype(jnp.int32)
  times = jnp.zeros(lookups, jnp.uint32).at[place].add(jnp.uint32(1), mode='drop')
  return Met(place, start, owner, lane, times)


def xla_add(place: Int32[Array, 'N'], values: Float[Array, 'N D'], places: int, leaf: int) -> Float[Array, 'K D']:
  """See `ExchangeKernels.add`. Sums are in the order of the lanes."""
  return jnp.zeros((places, values.shape[1])).at[place].add(values, mode='drop')


def native_meet(key: UInt32[Array, 'K W'], feature: UInt32[Array, 'K'], owner: Int32[Array, 'K'], devices: int) -> Met:
  """See `ExchangeKernels.meet`. No id stands more than once."""
  number, start = jax.ShapeDtypeStruct(owner.shape, jnp.int32), jax.ShapeDtypeStruct((devices + 1,), jnp.int32)
  shapes = Met(number, start, number, number, jax.ShapeDtypeStruct(owner.shape, jnp.uint32))
  return Met(*jax.ffi.ffi_call('dlrm_exchange_meet', shapes)(key, feature, owner))


def native_add(place: Int32[Array, 'N'], values: Float[Array, 'N D'], places: int, leaf: int) -> Float[Array, 'K D']:
  """See `ExchangeKernels.add`. The result does not depend on the number of threads."""
  total = jax.ShapeDtypeStruct((places, values.shape[1]), jnp.float32)
  return jax.ffi.ffi_call('dlrm_exchange_add', total)(place, values, leaf=leaf)


XLA = ExchangeKernels(xla_meet, xla_add, rows.XLA)
NATIVE = ExchangeKernels(native_meet, native_add, rows.NATIVE)  # needs native.build.load()
