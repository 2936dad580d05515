"""Dynamic dimension: an id's vector has more blocks, the oftener it was seen of late; the blocks it lacks read as zero.

The policy is the one that DeepRec suggests (docs_en/Dynamic-dimension-Embedding-Variable.md). In periods, each ended
by `refresh`, an id's mean occurrences a period are averaged exponentially, with Adam's correction for a short past.
Ids are ranked by it: with `blocks` n and `base` p, block k belongs to the first (p^(n+1-k) - 1) / (p^(n+1) - 1) of
them. For p = 2 and n = 4, 48 % have a block or more, 3 % all four.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32

from dlrm_jax.embeddings.directory import entries, frequency, rows_of
from dlrm_jax.native.rows import xla_read
from dlrm_jax.structs import Directory, Widths

BETA = 0.9
LEAST_MEAN = 1e-6  # ids with a lower mean are not ranked


def make_widths(directory: Directory, blocks: int) -> Widths:
  """Before the first period has ended: all ids have all blocks."""
  rows = rows_of(directory)
  zeros = jnp.zeros(rows), jnp.zeros(rows, jnp.uint32)
  return Widths(*zeros, periods=jnp.zeros((), jnp.int32), least=jnp.zeros(blocks))


def refresh(directory: Directory, widths: Widths, base: float = 2.0) -> Widths:
  """Ends a period. Passes over all rows: between steps."""
  seen = entries(directory).frequency
  mean = BETA * widths.mean + (1 - BETA) * (seen - widths.counted).astype(jnp.float32)
  mean = jnp.where(seen > 0, mean, 0)
  periods = widths.periods + 1
  blocks = len(widths.least)
  shares = (base ** np.arange(blocks, 0, -1.0) - 1) / (base ** (blocks + 1) - 1)
  ranks = (jnp.asarray(shares, jnp.float32) * jnp.sum(mean > LEAST_MEAN)).astype(jnp.int32)
  least = _ranked(mean, ranks) / (1 - BETA**periods)
  return Widths(mean=mean, counted=jnp.where(seen > 0, seen, 0), periods=periods, least=least)


def _ranked(mean: Float[Array, 'rows'], ranks: Int32[Array, 'K']) -> Float[Array, 'K']:
  """The value at each rank, 0 being the largest; without a sort of all rows, which takes seconds."""
  # Floats that are not negative are ordered as the integers of their bits.
  bits = jax.lax.bitcast_convert_type(mean, jnp.int32)

  def set_bit(i: Array, found: Array) -> Array:
    trial = found | jnp.left_shift(1, 30 - i)
    above = jax.lax.map(lambda least: jnp.sum(bits >= least, dtype=jnp.int32), trial)
    return jnp.where(above > ranks, trial, found)

  found = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(ranks.shape, jnp.int32))
  return jax.lax.bitcast_convert_type(found, jnp.float32)


def blocks_of(directory: Directory, widths: Widths, row: Int32[Array, 'N']) -> Int32[Array, 'N']:
  """How many blocks the id of each row has; no row has all of them, of zeros.

  Within a period an id may gain blocks, by what it has been seen in it already, but loses none.
  """
  mean, counted = xla_read((widths.mean, widths.counted), row)
  now = BETA * mean + (1 - BETA) * (frequency(directory, row) - counted).astype(jnp.float32)
  before = mean / jnp.maximum(1 - BETA**widths.periods, 1 - BETA)  # in no period: 0
  mean = jnp.maximum(before, now / (1 - BETA ** (widths.periods + 1)))
  has = mean[:, None] >= widths.least[None]
  return jnp.where(row < rows_of(directory), jnp.sum(has, axis=1, dtype=jnp.int32), len(widths.least))


def mask(blocks: Int32[Array, 'N'], most: int, dim: int) -> Float[Array, 'N D']:
  """What to multiply vectors by before the loss: 1 in the first `blocks` of `most` blocks. ValueError if dim does not
  divide into so many."""
  if dim % most:
    raise ValueError(f'dim={dim}: does not divide into {most} blocks')
  return (jnp.arange(dim)[None] < blocks[:, None] * (dim // most)).astype(jnp.float32)


def forget_free(directory: Directory, widths: Widths) -> Widths:
  """After rows became free (`evict`, `grow`): who claims one next starts at nothing."""
  used = entries(directory).frequency > 0
  return widths.replace(mean=jnp.where(used, widths.mean, 0), counted=jnp.where(used, widths.counted, 0))
