"""A directory of ids, as pure functions: which id lives in which row, how often and how lately it was seen.

Set-associative: a page has BUCKETS buckets of WAYS rows, and an id may live in CANDIDATES buckets of one page, in the
first of them that has a free way when it comes. 16 bytes a row. With 9.2 million ids and these numbers, 0.0003 % of
the ids find no place at a load of 0.55, 0.002 % at 0.6, 0.07 % at 0.75, 0.2 % at 0.8 (one bucket alone: 1.3, 2, 5
and 7 %).

row = (page * buckets + bucket) * ways + way. An id keeps its row until it is evicted or the directory grows. Nothing
depends on the number of devices: pages are cut among them, and an id never leaves its page; when a directory grows,
a page becomes two neighbours: twice the pages give an id twice the page number, or one more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32, UInt32

from dlrm_jax.native.directory import FEATURES, FREQUENCY, HIGH, LOW, STAMP, XLA, DirectoryKernels
from dlrm_jax.structs import Directory
from dlrm_jax.words import mix, scale

WAYS, BUCKETS, CANDIDATES = 8, 64, 4
PAGE_ROWS = WAYS * BUCKETS
BYTES_PER_ROW = 16
MOST_STEPS = 2**32 // FEATURES  # a stamp holds no later step
# A directory is to grow at this load, or when this share of its lookups finds no place.
FULL_LOAD, FULL_SHARE = 0.75, 0.001


class Ids(NamedTuple):
  """The ids of N lookups: the whole fingerprint and the feature, compared in full."""

  key: UInt32[Array, 'N 2']  # low and high half
  feature: UInt32[Array, 'N']  # less than FEATURES


# How many occurrences of its id a lane stands for; 0, or False: it looks for nothing.
Times = Bool[Array, 'N'] | UInt32[Array, 'N']


class Claimed(NamedTuple):
  """What a training lookup found."""

  row: Int32[Array, 'N']  # the number of rows: no row
  fresh: Int32[Array, 'N']  # the first `count`: lanes of the ids that are new in their rows, one each; then N
  count: Int32[Array, '']


def make_directory(rows: int, ways: int = WAYS, buckets: int = BUCKETS) -> Directory:
  """An empty directory of at least `rows` rows, in whole pages. `ways` is at most 32, `buckets` a power of two."""
  if not 1 <= ways <= 32 or buckets & (buckets - 1):
    raise ValueError(f'ways={ways} must be 1 to 32, buckets={buckets} a power of two')
  pages = -(-rows // (ways * buckets))
  if rows < 1 or pages * ways * buckets >= 2**31:
    raise ValueError(f'rows={rows}: a directory has at least one row and less than 2**31')
  return Directory(entry=jnp.zeros((pages, buckets, 4, ways), jnp.uint32), used=jnp.zeros((), jnp.int32))


def whole_pages(rows: int) -> int:
  """The rows of a directory of at least so many: of pages whose number many numbers of devices divide."""
  pages = -(-rows // PAGE_ROWS)
  unit = next(unit for unit in (240, 60, 12, 1) if pages >= 4 * unit or unit == 1)
  return -(-pages // unit) * unit * PAGE_ROWS


def rows_of(directory: Directory) -> int:
  """Its rows, free ones included: the number that means "no row"."""
  return directory.entry.size // 4


class Shard(NamedTuple):
  """Which of how many equal runs of pages a `Directory` is. The count must divide the pages of the whole."""

  index: int | Int32[Array, '']
  count: int


WHOLE = Shard(0, 1)


def owned(ids: Ids, shard: Shard) -> Bool[Array, 'N']:
  """Which ids belong to a shard, of a directory of any size: a directory and those that filter for it agree."""
  return owner_of(ids, shard.count) == shard.index


def owner_of(ids: Ids, shards: int) -> Int32[Array, 'N']:
  """The index of the shard that each id belongs to, of so many."""
  return scale(hash_words(ids)[0], shards).astype(jnp.int32)


def find(
  directory: Directory, ids: Ids, wanted: Bool[Array, 'N'], kernels: DirectoryKernels = XLA, shard: Shard = WHOLE
) -> Int32[Array, 'N']:
  """The rows of the wanted ids, numbered from the shard's first. Changes nothing: for evaluation and prediction."""
  return kernels.find(directory.entry, *ids, _places(directory, ids, wanted, shard))


def claim(
  directory: Directory,
  ids: Ids,
  times: Times,
  step: Int32[Array, ''],
  kernels: DirectoryKernels = XLA,
  shard: Shard = WHOLE,
) -> tuple[Directory, Claimed]:
  """The rows of the wanted ids; an id that has none gets a free one, with frequency 0, if its buckets have any.

  Then every lane with a row counts as so many occurrences of its id at `step`. Donate the directory, or it is copied.
  """
  places = _places(directory, ids, times > 0, shard)
  entry, row, fresh, count = kernels.claim(directory.entry, *ids, places, times.astype(jnp.uint32), step)
  return Directory(entry=entry, used=directory.used + count), Claimed(row, fresh, count)


def _places(directory: Directory, ids: Ids, wanted: Bool[Array, 'N'], shard: Shard) -> Int32[Array, 'N P']:
  """The shard's buckets that may hold each id, in the order in which they are tried; -1: not wanted, or not its id."""
  pages, buckets = directory.entry.shape[:2]
  word, other = hash_words(ids)
  page = scale(word, pages * shard.count).astype(jnp.int32)[:, None] - shard.index * pages
  # An odd stride visits every bucket of a page, whose number is a power of two.
  stride = (other >> 16) | 1
  bucket = (other[:, None] + stride[:, None] * jnp.arange(CANDIDATES, dtype=jnp.uint32)[None]) % buckets
  here = wanted[:, None] & (page >= 0) & (page < pages)
  return jnp.where(here, page * buckets + bucket.astype(jnp.int32), -1)


def hash_words(ids: Ids) -> tuple[Array, Array]:
  """Two words that depend on all of an id."""
  first = mix(ids.key[..., 0] + (ids.feature + 1) * jnp.uint32(0x9E3779B9))
  second = mix(ids.key[..., 1] ^ first)
  return second, mix(first + second * jnp.uint32(0x85EBCA6B))


class Entries(NamedTuple):
  """All rows of a directory. Where the frequency is 0, the rest means nothing."""

  ids: Ids
  frequency: UInt32[Array, 'rows']
  version: Int32[Array, 'rows']  # step of the last training lookup


def entries(directory: Directory) -> Entries:
  """What a directory knows, by row: for eviction, statistics and inspection."""
  low, high, frequency, stamp = (directory.entry[:, :, field].reshape(-1) for field in (LOW, HIGH, FREQUENCY, STAMP))
  ids = Ids(jnp.stack([low, high], axis=1), stamp % FEATURES)
  return Entries(ids, frequency, (stamp // FEATURES).astype(jnp.int32))


def frequency(directory: Directory, row: Int32[Array, 'N']) -> UInt32[Array, 'N']:
  """How often the ids of the rows were seen; 0 for no row."""
  at = {'mode': 'fill', 'fill_value': 0, 'wrap_negative_indices': False}
  return _flat(directory).at[*_address(directory, row, FREQUENCY)].get(**at)


def set_frequency(directory: Directory, row: Int32[Array, 'N'], value: UInt32[Array, 'N']) -> Directory:
  """The directory with these frequencies; no row is not written. `used` is as before."""
  at = {'mode': 'drop', 'wrap_negative_indices': False}
  flat = _flat(directory).at[*_address(directory, row, FREQUENCY)].set(value, **at)
  return directory.replace(entry=flat.reshape(directory.entry.shape))


def _flat(directory: Directory) -> Array:
  return directory.entry.reshape(-1, *directory.entry.shape[2:])


def _address(directory: Directory, row: Array, field: int) -> tuple[Array, int, Array]:
  ways = directory.entry.shape[3]
  return row // ways, field, row % ways


def evict(directory: Directory, gone: Bool[Array, 'rows']) -> Directory:
  """The directory without the ids of these rows. A pass over all rows: between steps."""
  old = directory.entry[:, :, FREQUENCY]
  new = jnp.where(gone.reshape(old.shape), 0, old)
  used = jnp.sum(new > 0, dtype=jnp.int32)
  entry = directory.entry.at[:, :, FREQUENCY].set(new)
  return Directory(entry=entry, used=used)


def is_full(directory: Directory, lookups: int, without_place: int) -> bool:
  """Whether it is time to grow: from the load, and from what found no place among the lookups since last asked."""
  return int(directory.used) > FULL_LOAD * rows_of(directory) or without_place > FULL_SHARE * lookups


def grow(directory: Directory) -> Directory:
  """The directory with twice the pages: every id stands where it stood, in one of the two that its page became.

  So no id is lost, and no search is needed; tables follow with `grow_rows`. Needs the memory of both at once.
  """
  pages, buckets, fields, ways = directory.entry.shape
  if 2 * rows_of(directory) >= 2**31:
    raise ValueError(f'a directory of {rows_of(directory)} rows cannot grow: rows are numbered below 2**31')
  half = scale(hash_words(entries(directory).ids)[0], 2 * pages) % 2
  half = half.reshape(pages, 1, buckets, ways)
  old = directory.entry[:, None]
  new = jnp.broadcast_to(old, (pages, 2, buckets, fields, ways))
  stays = half == jnp.arange(2).reshape(1, 2, 1, 1)
  new = new.at[:, :, :, FREQUENCY].set(jnp.where(stays, new[:, :, :, FREQUENCY], 0))
  return directory.replace(entry=new.reshape(2 * pages, buckets, fields, ways))


def grow_rows(leaf: Array, pages: int) -> Array:
  """A table's leaf [rows, ...] for the directory that `grow` made of one with `pages` pages.

  Both halves get a copy of the page; the rows whose ids went to the other half are free, so it does not matter.
  """
  split = leaf.reshape(pages, 1, leaf.shape[0] // pages, *leaf.shape[1:])
  return jnp.broadcast_to(split, (pages, 2, *split.shape[2:])).reshape(2 * leaf.shape[0], *leaf.shape[1:])


def insert(directory: Directory, old: Entries, kernels: DirectoryKernels = XLA) -> tuple[Directory, Int32[Array, 'N']]:
  """The directory with the entries of another that are not free, and where each went; no row: its buckets are full.

  For restoring into another capacity. The ids must be distinct, and new here.
  """
  alive = old.frequency > 0
  directory, claimed = claim(directory, old.ids, alive, jnp.zeros((), jnp.int32), kernels)
  stamp = old.version.astype(jnp.uint32) * FEATURES + old.ids.feature
  flat = _flat(directory).at[*_address(directory, claimed.row, FREQUENCY)].set(old.frequency, mode='drop')
  flat = flat.at[*_address(directory, claimed.row, STAMP)].set(stamp, mode='drop')
  return directory.replace(entry=flat.reshape(directory.entry.shape)), claimed.row


def ids_per_feature(directory: Directory, features: UInt32[Array, 'F']) -> UInt32[Array, 'F']:
  """How many ids of each of these features have a row. A pass over all rows for each: for the log."""
  return _per_feature(directory, directory.entry[:, :, FREQUENCY] > 0, features)


def gone_per_feature(old: Directory, new: Directory, features: UInt32[Array, 'F']) -> UInt32[Array, 'F']:
  """How many ids of each of these features `evict` took the row from, when it made `new` of `old`."""
  return _per_feature(new, (old.entry[:, :, FREQUENCY] > 0) & (new.entry[:, :, FREQUENCY] == 0), features)


def _per_feature(directory: Directory, which: Array, features: Array) -> Array:
  stamp = directory.entry[:, :, STAMP]
  return jax.lax.map(lambda feature: jnp.sum(which & (stamp % FEATURES == feature), dtype=jnp.uint32), features)
