"""Seeded orders of rows, and memory that is used again."""

import numpy as np


class Memory:
  """Arrays of packed rows to use again: the first touch of new memory costs more than all that is done in it."""

  def __init__(self, numbers: int) -> None:
    self._free: list[np.ndarray] = []
    self._width = numbers

  def take(self, rows: int) -> np.ndarray:
    """`u32[rows, width]`, undefined; in any thread."""
    try:
      array = self._free.pop()
    except IndexError:
      array = np.empty((0, self._width), np.uint32)
    return array[:rows] if rows <= len(array) else np.empty((rows, self._width), np.uint32)

  def give(self, rows: np.ndarray) -> None:
    """Takes back what `take` gave, or a slice of it, once: nobody reads it any more."""
    self._free.append(rows if rows.base is None else rows.base)


def seeded_order(entropy: tuple[int, ...], count: int) -> np.ndarray:
  """A permutation of `count` numbers: the Philox generator, seeded by these at most four numbers and nothing else."""
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).permutation(count)


def reorder(rows: np.ndarray, order: np.ndarray, memory: Memory) -> np.ndarray:
  """`rows[order]` in other memory; `rows`, taken from `memory`, go back."""
  # The numbers are all in range; mode='clip' spares numpy the copy that it makes in order to check them first.
  out = rows.take(order, axis=0, out=memory.take(len(rows)), mode='clip')
  memory.give(rows)
  return out
