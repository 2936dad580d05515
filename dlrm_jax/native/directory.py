"""Finding and claiming rows for ids, in XLA and in C++ (directory.cc): the same bits, and the same promises.

The entries of a directory are u32[pages, buckets, 4, ways]: for each way of each bucket the id's key (two words), its
frequency (0: the way is free, and whatever else it says is dead) and its stamp, `step of its last update * 32 +
feature`. Row number = (page * buckets + bucket) * ways + way.

An id comes with its places, the buckets (numbered through all pages) that may hold it, all in one page; -1: the lane
looks for nothing. "No row" is the number of rows. Entries must be donated, or they are copied.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32, UInt32

from dlrm_jax.native.bloom import Add, native_add, xla_add

LOW, HIGH, FREQUENCY, STAMP = range(4)  # the fields of an entry
FEATURES = 32  # that a stamp can tell apart
MOST_FREQUENCY = 2**31 - 1  # from here on an id's occurrences may go uncounted, so that no frequency becomes 0

Entry = UInt32[Array, 'pages buckets 4 ways']
Claimed = tuple[Entry, Int32[Array, 'N'], Int32[Array, 'N'], Int32[Array, '']]


class DirectoryKernels(NamedTuple):
  """Either form."""

  # (entry, key u32[N, 2], feature u32[N], place i32[N, P]) -> row i32[N]. Reads only.
  find: Callable[[Array, Array, Array, Array], Array]
  # (entry, key, feature, place, times u32[N], step i32[]) -> (entry, row i32[N], fresh i32[N], count i32[]). A lane's
  # id is found, or else claims the first free way of the first of its places that has one; lanes with equal ids get one
  # row. All lanes try their first place before any tries its second, and each time the lower lane comes first. Every
  # lane with a row adds its times, which are not 0, to its frequency and stamps it with the step. The first `count` of
  # `fresh` are the lanes, ascending, that claimed, one for each new id; the rest are N.
  claim: Callable[[Array, Array, Array, Array, Array, Array], Claimed]
  add: Add  # of a counting Bloom filter, see bloom.py


def xla_find(
  entry: Entry, key: UInt32[Array, 'N 2'], feature: UInt32[Array, 'N'], place: Int32[Array, 'N P']
) -> Int32[Array, 'N']:
  """See `DirectoryKernels.find`."""
  buckets, ways = _flat(entry), entry.shape[3]
  none = entry.size // 4

  def look(carry: tuple[Array, Array]) -> tuple[Array, Array]:
    i, row = carry
    bucket = jax.lax.dynamic_index_in_dim(place, i, axis=1, keepdims=False)
    way, _ = _match(_read(buckets, bucket), key, feature)
    return i + 1, jnp.where((row == none) & (bucket >= 0) & (way < ways), bucket * ways + way, row)

  def unfinished(carry: tuple[Array, Array]) -> Array:
    i, row = carry
    return (i < place.shape[1]) & jnp.any((row == none) & (place[:, 0] >= 0))

  return jax.lax.while_loop(unfinished, look, (jnp.zeros((), jnp.int32), jnp.full(len(key), none, jnp.int32)))[1]


def xla_claim(
  entry: Entry,
  key: UInt32[Array, 'N 2'],
  feature: UInt32[Array, 'N'],
  place: Int32[Array, 'N P'],
  times: UInt32[Array, 'N'],
  step: Int32[Array, ''],
) -> Claimed:
  """See `DirectoryKernels.claim`.

  Without a sort: in every round, each bucket that lanes still want has its first free way won by the lowest of them.
  """
  n, none = len(key), entry.size // 4
  lane = jnp.arange(n, dtype=jnp.int32)
  stamp = step.astype(jnp.uint32) * FEATURES + feature
  row = xla_find(entry, key, feature, place)

  def open_lanes(row: Array) -> Array:
    return (row == none) & (place[:, 0] >= 0)

  def unfinished(carry: tuple[Array, ...]) -> Array:
    i, _, row, _ = carry
    return (i < place.shape[1]) & jnp.any(open_lanes(row))

  def one_round(carry: tuple[Array, ...]) -> tuple[Array, ...]:
    i, buckets, row, fresh = carry
    ways = buckets.shape[2]
    bucket = jax.lax.dynamic_index_in_dim(place, i, axis=1, keepdims=False)
    way, free = _match(_read(buckets, bucket), key, feature)
    row = jnp.where(open_lanes(row) & (way < ways), bucket * ways + way, row)
    wants = open_lanes(row) & (free < ways)
    at = _nowhere_unless(wants, bucket, buckets.shape[0])
    # The lanes are put to the vote in the free way itself, which is dead until the winner writes it.
    buckets = buckets.at[at, LOW, free].set(jnp.uint32(n), mode='drop')
    buckets = buckets.at[at, LOW, free].min(lane.astype(jnp.uint32), mode='drop')
    wins = wants & (buckets.at[at, LOW, free].get(mode='fill', fill_value=n) == lane)
    new = jnp.stack([key[:, 0], key[:, 1], times, stamp], axis=1)
    buckets = buckets.at[_nowhere_unless(wins, bucket, buckets.shape[0]), :, free].set(new, mode='drop')
    row = jnp.where(wins, bucket * ways + free, row)
    return jnp.where(jnp.any(wants), i, i + 1), buckets, row, fresh | wins

  carry = (jnp.zeros((), jnp.int32), _flat(entry), row, jnp.zeros(n, bool))
  _, buckets, row, fresh = jax.lax.while_loop(unfinished, one_round, carry)
  buckets = _count(buckets, row, jnp.where(fresh, 0, times), stamp)
  place_in_list = jnp.where(fresh, jnp.cumsum(fresh) - 1, n)
  lanes = jnp.full(n, n, jnp.int32).at[place_in_list].set(lane, mode='drop')
  return buckets.reshape(entry.shape), row, lanes, jnp.sum(fresh, dtype=jnp.int32)


def _flat(entry: Array) -> Array:
  return entry.reshape(-1, *entry.shape[2:])


def _read(buckets: Array, bucket: Array) -> Array:
  return buckets.at[bucket].get(mode='fill', fill_value=0, wrap_negative_indices=False)


def _match(ways: UInt32[Array, 'N 4 ways'], key: Array, feature: Array) -> tuple[Array, Array]:
  """Of each lane the way that has its id, and the first that is free; the number of ways if there is none."""
  same = (ways[:, LOW] == key[:, :1]) & (ways[:, HIGH] == key[:, 1:]) & (ways[:, STAMP] % FEATURES == feature[:, None])
  free = ways[:, FREQUENCY] == 0
  return _first(same & ~free), _first(free)


def _first(found: Bool[Array, 'N ways']) -> Int32[Array, 'N']:
  way = jnp.arange(found.shape[1], dtype=jnp.int32)[None]
  return jnp.min(jnp.where(found, way, found.shape[1]), axis=1)


def _nowhere_unless(condition: Array, bucket: Array, buckets: int) -> Array:
  return jnp.where(condition, bucket, buckets)


def _count(buckets: Array, row: Array, times: Array, stamp: Array) -> Array:
  """More occurrences for each lane's row, and its stamp."""
  bucket, way = row // buckets.shape[2], row % buckets.shape[2]
  frequency = buckets.at[bucket, FREQUENCY, way].get(mode='fill', fill_value=0)
  more = jnp.where(frequency < MOST_FREQUENCY, times, 0)
  buckets = buckets.at[bucket, FREQUENCY, way].add(more, mode='drop')
  return buckets.at[bucket, STAMP, way].set(stamp, mode='drop')


def native_find(
  entry: Entry, key: UInt32[Array, 'N 2'], feature: UInt32[Array, 'N'], place: Int32[Array, 'N P']
) -> Int32[Array, 'N']:
  """See `DirectoryKernels.find`."""
  return jax.ffi.ffi_call('dlrm_directory_find', jax.ShapeDtypeStruct((len(key),), jnp.int32))(
    entry, key, feature, place
  )


def native_claim(
  entry: Entry,
  key: UInt32[Array, 'N 2'],
  feature: UInt32[Array, 'N'],
  place: Int32[Array, 'N P'],
  times: UInt32[Array, 'N'],
  step: Int32[Array, ''],
) -> Claimed:
  """See `DirectoryKernels.claim`. The result does not depend on the number of threads."""
  lanes = jax.ShapeDtypeStruct((len(key),), jnp.int32)
  shapes = (jax.ShapeDtypeStruct(entry.shape, jnp.uint32), lanes, lanes, jax.ShapeDtypeStruct((), jnp.int32))
  call = jax.ffi.ffi_call('dlrm_directory_claim', shapes, input_output_aliases={0: 0})
  return tuple(call(entry, key, feature, place, times, step))


XLA = DirectoryKernels(xla_find, xla_claim, xla_add)
NATIVE = DirectoryKernels(native_find, native_claim, native_add)  # needs native.build.load()
