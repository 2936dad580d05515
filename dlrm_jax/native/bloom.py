"""A counting Bloom filter's step, in XLA and in C++ (bloom.cc): the same bits.

`add(counters [regions, size], word u32[N, 2], region i32[N], times u32[N], hashes, limit)` adds its times to each of
the `hashes` counters of every lane whose region is not negative, where a counter stops at `limit`, and gives the
counters and u32[N], the least of each lane's counters after all of them; 0 for the other lanes. A lane's i-th counter
is number (word[0] + i * word[1] mod 2**32) * size / 2**32 of its region. Counters must be donated, or they are copied,
and `limit + hashes` must be less than their type holds.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32, UInt, UInt32

from dlrm_jax.words import scale

Add = Callable[[Array, Array, Array, Array, int, int], tuple[Array, Array]]
Added = tuple[UInt[Array, 'regions size'], UInt32[Array, 'N']]
CHUNK = 1024  # lanes added at once, or as many as cannot make a small counter wrap


def xla_add(
  counters: UInt[Array, 'regions size'],
  word: UInt32[Array, 'N 2'],
  region: Int32[Array, 'N'],
  times: UInt32[Array, 'N'],
  hashes: int,
  limit: int,
) -> Added:
  """See above. Adds one at a time, since a small counter would wrap otherwise: `limit` passes at most."""
  n, (regions, size) = len(region), counters.shape
  chunk = min(CHUNK, (int(np.iinfo(counters.dtype).max) - limit) // hashes)
  lanes = jnp.nonzero(region >= 0, size=-(-n // chunk) * chunk, fill_value=n)[0]
  chunks = (jnp.sum(region >= 0, dtype=jnp.int32) + chunk - 1) // chunk

  def positions(i: Array) -> tuple[Array, Array]:
    lane = jax.lax.dynamic_slice_in_dim(lanes, i * chunk, chunk)
    words = word.at[lane].get(mode='fill', fill_value=0)
    at = scale(words[:, :1] + jnp.arange(hashes, dtype=jnp.uint32)[None] * words[:, 1:], size)
    first = region.at[lane].get(mode='fill', fill_value=regions) * size
    return lane, jnp.where(lane[:, None] < n, first[:, None] + at.astype(jnp.int32), regions * size)

  def add(time: Array, i: Array, counters: Array) -> Array:
    lane, at = positions(i)
    more = times.at[lane].get(mode='fill', fill_value=0) > time
    at = jnp.where(more[:, None], at, regions * size)
    added = counters.at[at].add(jnp.ones((), counters.dtype), mode='drop')
    return added.at[at].min(jnp.array(limit, counters.dtype), mode='drop')

  def read(i: Array, least: Array) -> Array:
    lane, at = positions(i)
    smallest = jnp.min(counters.at[at].get(mode='fill', fill_value=0).astype(jnp.uint32), axis=1)
    return least.at[lane].set(smallest, mode='drop')

  add_one = lambda time, counters: jax.lax.fori_loop(0, chunks, functools.partial(add, time), counters)
  most = jnp.minimum(jnp.max(jnp.where(region >= 0, times, 0)), limit)
  counters = jax.lax.fori_loop(jnp.uint32(0), most, add_one, counters.reshape(-1))
  return counters.reshape(regions, size), jax.lax.fori_loop(0, chunks, read, jnp.zeros(n, jnp.uint32))


def native_add(
  counters: UInt[Array, 'regions size'],
  word: UInt32[Array, 'N 2'],
  region: Int32[Array, 'N'],
  times: UInt32[Array, 'N'],
  hashes: int,
  limit: int,
) -> Added:
  """See above. The result does not depend on the number of threads."""
  shapes = (jax.ShapeDtypeStruct(counters.shape, counters.dtype), jax.ShapeDtypeStruct(region.shape, jnp.uint32))
  call = jax.ffi.ffi_call('dlrm_bloom_add', shapes, input_output_aliases={0: 0})
  return tuple(call(counters, word, region, times, hashes=np.int64(hashes), limit=np.int64(limit)))
