"""Who loses their row: a mask over rows, between steps. A row's vector and slots go with it; an id that comes back
starts afresh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from dlrm_jax import bits
from dlrm_jax.embeddings.directory import entries, evict
from dlrm_jax.optim.rowwise import Stored
from dlrm_jax.structs import Directory

# (directory, value f32[rows, D], or None for a directory without vectors, step i32[]) -> bool[rows]
Gone = Callable[[Directory, Array | None, Array], Array]


def never(directory: Directory, value: Array | None, step: Int32[Array, '']) -> Bool[Array, 'rows']:
  """Nobody."""
  return jnp.zeros(directory.entry.size // 4, bool)


def global_step(steps_to_live: int) -> Gone:
  """Whose last training lookup was more than this many steps ago. Ids that wait for admission, too."""

  def gone(directory: Directory, value: Array | None, step: Int32[Array, '']) -> Bool[Array, 'rows']:
    return step - entries(directory).version > steps_to_live

  return gone


def l2(threshold: float) -> Gone:
  """Whose vector w has 0.5 * sum(w^2) below the threshold. A directory without vectors keeps its ids."""

  def gone(directory: Directory, value: Array | None, step: Int32[Array, '']) -> Bool[Array, 'rows']:
    if value is None:
      return never(directory, value, step)
    return 0.5 * jnp.sum(bits.widen(value) ** 2, axis=1) < threshold

  return gone


def least_recent(directory: Directory, keep: int) -> Bool[Array, 'rows']:
  """Those seen longest ago: all but at most `keep` ids. Ids of one step stay or go together."""
  _, frequency, version = entries(directory)

  def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds  # too many were seen after `low`, few enough after `high`
    middle = low + (high - low) // 2
    few = jnp.sum((frequency > 0) & (version > middle), dtype=jnp.int32) <= keep
    return jnp.where(few, low, middle), jnp.where(few, middle, high)

  first = jnp.array(-1, jnp.int32), jnp.max(version)
  _, last_gone = jax.lax.fori_loop(0, 28, halve, first)  # a version has 27 bits
  return (version <= last_gone) & (directory.used > keep)


def evict_ids(
  gone: Gone, directory: Directory, remembered: Any, value: Stored, step: Int32[Array, '']
) -> tuple[Directory, Any]:
  """The directory, and the filter of its admission, without those that must go."""
  directory = evict(directory, gone(directory, value, step))
  if isinstance(remembered, Directory):
    remembered = evict(remembered, gone(remembered, None, step))
  return directory, remembered


EVICTIONS = {'never': lambda: never, 'global_step': global_step, 'l2': l2}
