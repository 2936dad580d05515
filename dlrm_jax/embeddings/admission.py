"""Who gets a trainable row: every id at once, or only ids that were seen often enough.

An id is admitted at the lookup that reaches the threshold. A lookup is all of a batch: an id's occurrences in it count
one by one, and all of them get the row, or none. An id that is not yet admitted has no row, so it reads as zero and
is not trained, and it occupies no vector and no slots.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int32, UInt32

from dlrm_jax.embeddings.directory import (
  PAGE_ROWS,
  WHOLE,
  Ids,
  Shard,
  Times,
  claim,
  find,
  frequency,
  hash_words,
  make_directory,
  owned,
  rows_of,
  set_frequency,
  whole_pages,
)
from dlrm_jax.native.directory import XLA, DirectoryKernels
from dlrm_jax.structs import Directory
from dlrm_jax.words import scale

CHUNK = 1024  # new ids that are handled at once
COUNTERS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}
# A Bloom filter is cut into so many regions, of which an id has one, unless they would be smaller than REGION_SIZE.
REGIONS, REGION_SIZE = 240, 1 << 12


class Resolved(NamedTuple):
  """What a training step's lookups came to; N of them."""

  row: Int32[Array, 'N']  # the number of rows: no row
  fresh: Int32[Array, 'N']  # the first `count`: lanes of ids that are new in their rows, one each; then N
  count: Int32[Array, '']
  refused: Bool[Array, 'N']  # not yet admitted
  unplaced: Bool[Array, 'N']  # admitted (or to be counted), but every bucket of theirs is full


def only(times: Times, wanted: Bool[Array, 'N']) -> Times:
  """The times of these lanes; the others look for nothing."""
  return jnp.where(wanted, times, jnp.zeros_like(times))


class Admission(NamedTuple):
  """One way to admit ids. Both functions are pure; `filter` is what it remembers of ids that have no row."""

  init: Callable[..., Any]  # (devices=1 among which it is cut) -> a device's part of the filter
  # (directory, filter, ids, times, step i32[], shard) -> (directory, filter, Resolved). Donate both. With
  # directory and filter of one shard of several, it looks at that shard's ids alone: rows are numbered from the
  # shard's first, nothing else is marked, and `used` has grown by what this shard claimed.
  resolve: Callable[..., tuple[Directory, Any, Resolved]]
  parts: int = 0  # into how many equal parts the filter can be cut; 0: as many as one likes


def always(kernels: DirectoryKernels = XLA) -> Admission:
  """Every id, at its first lookup."""

  def resolve(
    directory: Directory, remembered: tuple[()], ids: Ids, times: Times, step: Array, shard: Shard = WHOLE
  ) -> tuple[Directory, tuple[()], Resolved]:
    wanted = (times > 0) & owned(ids, shard)
    directory, claimed = claim(directory, ids, only(times, wanted), step, kernels, shard)
    unplaced = wanted & (claimed.row == rows_of(directory))
    return directory, remembered, Resolved(*claimed, jnp.zeros_like(wanted), unplaced)

  return Admission(lambda devices=1: (), resolve)


def counter(threshold: int, rows: int, kernels: DirectoryKernels = XLA) -> Admission:
  """Ids that were seen `threshold` times, counted exactly in a directory of their own with room for `rows` of them.

  An admitted id brings its count along, and leaves that directory. An id for which either directory has no place is
  not admitted; if it has been counted, it is admitted as soon as there is a row.
  """

  def resolve(
    directory: Directory, waiting: Directory, ids: Ids, times: Times, step: Array, shard: Shard = WHOLE
  ) -> tuple[Directory, Directory, Resolved]:
    wanted = (times > 0) & owned(ids, shard)
    unknown = wanted & (find(directory, ids, wanted, kernels, shard) == rows_of(directory))
    waiting, counted = claim(waiting, ids, only(times, unknown), step, kernels, shard)
    seen = frequency(waiting, counted.row)
    admitted = unknown & (seen >= threshold)
    directory, claimed = claim(directory, ids, only(times, wanted & (~unknown | admitted)), step, kernels, shard)

    def move(i: Array, carry: tuple[Directory, Directory]) -> tuple[Directory, Directory]:
      directory, waiting = carry
      lane = jax.lax.dynamic_slice_in_dim(lanes, i * CHUNK, CHUNK)
      row, old_row = (
        x.at[lane].get(mode='fill', fill_value=rows_of(d))
        for x, d in ((claimed.row, directory), (counted.row, waiting))
      )
      count = seen.at[lane].get(mode='fill', fill_value=0)
      return set_frequency(directory, row, count), set_frequency(waiting, old_row, jnp.zeros_like(count))

    lanes = jnp.pad(claimed.fresh, (0, -len(wanted) % CHUNK), constant_values=len(wanted))
    chunks = (claimed.count + CHUNK - 1) // CHUNK
    directory, waiting = jax.lax.fori_loop(0, chunks, move, (directory, waiting))
    waiting = waiting.replace(used=waiting.used - claimed.count)
    no_count = unknown & (counted.row == rows_of(waiting))
    no_row = admitted & (claimed.row == rows_of(directory))
    return directory, waiting, Resolved(*claimed, unknown & ~admitted & ~no_count, no_count | no_row)

  rows = whole_pages(rows)
  return Admission(lambda devices=1: make_directory(rows // devices), resolve, rows // PAGE_ROWS)


def counting_bloom(
  threshold: int, expected_ids: int, error_rate: float, bits: int, kernels: DirectoryKernels = XLA
) -> Admission:
  """Ids that were seen `threshold` times, as a counting Bloom filter remembers it: some too early, none too late.

  The filter never forgets: an id that was evicted is admitted again at once. Its frequency counts from the batch that
  admits it. ValueError if counters of so few bits cannot count to the threshold.
  """
  hashes, size = bloom_size(expected_ids, error_rate)
  if bits not in COUNTERS or threshold + hashes >= 2**bits:
    raise ValueError(
      f'bits={bits}: a counter of a Bloom filter with threshold {threshold} and {hashes} hash functions must be one of '
      f'{", ".join(str(b) for b in COUNTERS if threshold + hashes < 2**b)} bits'
    )

  def resolve(
    directory: Directory, counters: Array, ids: Ids, times: Times, step: Array, shard: Shard = WHOLE
  ) -> tuple[Directory, Array, Resolved]:
    wanted = (times > 0) & owned(ids, shard)
    unknown = wanted & (find(directory, ids, wanted, kernels, shard) == rows_of(directory))
    region, words = bloom_words(ids, counters.shape[0], shard)
    region, times = jnp.where(unknown, region, -1), times.astype(jnp.uint32)
    counters, seen = kernels.add(counters, words, region, times, hashes, threshold)
    admitted = unknown & (seen >= threshold)
    directory, claimed = claim(directory, ids, only(times, wanted & (~unknown | admitted)), step, kernels, shard)
    unplaced = admitted & (claimed.row == rows_of(directory))
    return directory, counters, Resolved(*claimed, unknown & ~admitted, unplaced)

  regions = REGIONS if size >= REGIONS * REGION_SIZE else 1
  init = lambda devices=1: jnp.zeros((regions // devices, -(-size // regions)), COUNTERS[bits])
  return Admission(init, resolve, regions)


def bloom_size(expected_ids: int, error_rate: float) -> tuple[int, int]:
  """Hash functions and counters of a Bloom filter, by DeepRec's formulas, in float32 as there.

  ValueError if there would be 2**31 counters or more. Source: DeepRec, core/framework/embedding/embedding_config.h.
  """
  one, two = np.float32(abs(math.log(error_rate))), np.float32(math.log(2))
  hashes = math.ceil(np.float32(abs(np.float32(math.log(error_rate)) / two)))
  size = math.ceil(np.float32(one / np.float32(two * two) * np.float32(expected_ids)))
  if size >= 2**31:
    raise ValueError(f'expected_ids={expected_ids}: {size} counters; a filter has less than {2**31}')
  return hashes, size


def bloom_words(ids: Ids, regions: int, shard: Shard) -> tuple[Int32[Array, 'N'], UInt32[Array, 'N 2']]:
  """The region of each id, from the first of a shard with so many of them, and the words its counters come from."""
  word, other = hash_words(ids)
  region = scale(word, regions * shard.count).astype(jnp.int32) - shard.index * regions
  # Odd, so that no two of an id's counters are one by this.
  return region, jnp.stack([other ^ jnp.uint32(0x5BD1E995), ids.key[:, 0] ^ word | 1], axis=1)


ADMISSIONS = {'always': always, 'counter': counter, 'counting_bloom': counting_bloom}
