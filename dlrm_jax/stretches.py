"""Stretches: steps that follow each other with nothing due between them, done in one call.

To start a call takes as long as a tenth of a step of 512 examples on two cores, and what one step leaves in the caches
is there for the next only inside of a call.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dlrm_jax.program import Program
from dlrm_jax.step import Metrics, jit_train_step, jit_train_steps
from dlrm_jax.structs import Batch, TrainState

# At most as many steps, and about as many examples, as gain anything.
MOST_STEPS, MOST_EXAMPLES = 20, 10240


class Place(NamedTuple):
  """Where the data stands after a batch."""

  position: Any
  skipped_rows: int  # of this process, so far


class Stretch(NamedTuple):
  """Some batches out of a stack of them."""

  batches: Batch  # the stack, [K, B, ...]; or, where stacks have one, that batch
  first: int  # of the stack
  after: int
  place: Place  # after the last of these batches

  @property
  def steps(self) -> int:
    """Batches, each of which is a step."""
    return self.after - self.first


def stack_size(program: Program) -> int:
  """Batches of a stack."""
  examples = -(-program.spec.batch_size // program.axis.size)  # of a device
  return max(1, min(MOST_STEPS, MOST_EXAMPLES // examples))


class Stacked:
  """Iterator over (stack of `size` batches, the places after each), from one of pipeline.py's or queue_reader.py's."""

  def __init__(self, batches: Any, size: int) -> None:
    self._batches, self._size = batches, size

  def __iter__(self) -> 'Stacked':
    return self

  def __next__(self) -> tuple[Batch, list[Place]]:
    batches, places = [], []
    for _ in range(self._size):
      batch, position = next(self._batches)
      batches.append(batch)
      places.append(Place(position, self._batches.skipped_rows))
    return batches[0] if self._size == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches), places

  def close(self) -> None:
    """Closes the batches."""
    self._batches.close()


class Stretches:
  """Cuts stacks on the device, with the places after their batches, into stretches."""

  def __init__(self, stacks: Iterator[tuple[Batch, list[Place]]]) -> None:
    self._stacks = stacks
    self._stack, self._places, self._first = None, [], 0

  def take(self, most: int) -> Stretch:
    """The next stretch, of at most so many steps."""
    if self._first == len(self._places):
      (self._stack, self._places), self._first = next(self._stacks), 0
    first, self._first = self._first, min(self._first + most, len(self._places))
    return Stretch(self._stack, first, self._first, self._places[self._first - 1])


def jit_train_stretch(program: Program) -> Callable[[TrainState, Stretch], tuple[TrainState, Metrics]]:
  """The state after a stretch, and the mean loss and number of its examples; see `jit_train_step`."""
  if stack_size(program) == 1:
    step = jit_train_step(program)
    return lambda state, stretch: step(state, stretch.batches)
  steps = jit_train_steps(program)
  return lambda state, stretch: steps(state, stretch.batches, stretch.first, stretch.after)
