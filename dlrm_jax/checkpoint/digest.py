"""Digests of arrays by their bits: whether a checkpoint holds what was saved. Its files have no sums of their own.

They do not depend on how arrays are cut among devices. Each device takes those of what it has: nothing is sent but the
digests themselves.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jaxtyping import UInt32

from dlrm_jax.words import mix

# Of the arrays of a tree, by their dotted names: two words each. A checkpoint's have that of its texts among them.
Digests = dict[str, Any]


@jax.jit
def _digest(part: Array, first: Array) -> UInt32[Array, '2']:
  """Of a part of an array, whose first row is the so many-th: parts add up."""
  part = part if part.ndim else part[None]
  row = first + jnp.arange(len(part), dtype=jnp.uint32)
  return mix(row_digests(part) ^ mix(row)[None]).sum(axis=1)


def row_digests(part: Array) -> UInt32[Array, '2 rows']:
  """Of each row of an array by itself."""
  words = jax.lax.bitcast_convert_type(part, jnp.dtype(f'uint{8 * part.dtype.itemsize}')).astype(jnp.uint32)
  words = words.reshape(len(part), -1)
  column = jnp.arange(words.shape[1], dtype=jnp.uint32)[None]
  # Every step is a bijection of its word, so that a single word that differs is always seen.
  mixed = mix(words ^ mix(column))
  zero, add = jnp.uint32(0), lambda one, other: (one[0] + other[0], one[1] + other[1])
  # Both sums in one pass: twice as fast as one after the other.
  return jnp.stack(jax.lax.reduce((mixed, mixed * (2 * column + 1)), (zero, zero), add, dimensions=(1,)))


def digest(tree: Any) -> Digests:
  """Of each array of a tree, in every process. Waits for all processes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  own = []
  for _, leaf in leaves:
    shards = [shard for shard in leaf.addressable_shards if not shard.replica_id]  # of what several have, one counts
    own.append([_digest(shard.data, np.uint32(first_row(shard))) for shard in shards])
  zero = np.zeros(2, np.uint32)
  words = np.array([np.sum([zero, *parts], axis=0, dtype=np.uint32) for parts in jax.device_get(own)])
  words = multihost_utils.process_allgather(words).sum(axis=0, dtype=np.uint32)
  names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in leaves]
  return dict(zip(names, words.tolist(), strict=True))


def of_texts(*parts: Any) -> str:
  """Of what is saved as JSON."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def first_row(shard: Any) -> int:
  """Where a device's part of an array begins."""
  return (shard.index[0].start or 0) if shard.index else 0


def check(tree: Any, saved: Digests) -> None:
  """ValueError that names the first array whose digest is another one, if digests were saved. Waits as `digest`."""
  for name, words in digest(tree).items():
    if saved and words != saved.get(name):
      raise ValueError(f'the numbers of {name} are not those that were saved')
