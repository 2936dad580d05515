"""Staging: parse, hash and place batches ahead of the step, in the order of the batches.

The seed's `smartstaged`. A staged item carries the loader's state after its batch, so what a checkpoint saves is the
position of the last batch that was trained on, however far ahead the loader is.
"""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar('Item')
Placed = TypeVar('Placed')
State = TypeVar('State')

_END = object()


class Staged(Generic[Placed, State]):
  """Iterator over `(place(item), state)`; a context manager. Made by `stage`.

  Attributes:
    items: what is staged.
  """

  def __init__(
    self, items: Iterator[tuple[Item, State]], place: Callable[[Item], Placed], depth: int, background: bool
  ) -> None:
    self.items, self._place = items, place
    # One thread takes the tasks in order, so order, exceptions and the end need no further care.
    self._executor = ThreadPoolExecutor(1, thread_name_prefix='stage') if background else None
    self._ahead: collections.deque[Future] = collections.deque()
    self._depth = depth
    self._exhausted = False  # nothing is taken from the items any more: they ended, failed or were closed
    self._closed = False

  def __iter__(self) -> 'Staged[Placed, State]':
    return self

  def __next__(self) -> tuple[Placed, State]:
    if self._closed:
      raise StopIteration
    try:
      item = self._next_ahead() if self._executor else self._work()
    except BaseException:
      self.close()
      raise
    if item is _END:
      self.close()
      raise StopIteration
    return item

  def _next_ahead(self) -> tuple[Placed, State] | object:
    while len(self._ahead) <= self._depth:
      self._ahead.append(self._executor.submit(self._work))
    return self._ahead.popleft().result()

  def _work(self) -> tuple[Placed, State] | object:
    """The next item, placed."""
    if self._exhausted:
      return _END
    try:
      item, state = next(self.items)
      return self._place(item), state
    except StopIteration:
      self._exhausted = True
      return _END
    except BaseException:
      self._exhausted = True
      raise

  def close(self) -> None:
    """Ends the thread and the items; what was staged is dropped. Idempotent."""
    self._closed = self._exhausted = True
    if self._executor:
      self._executor.shutdown(wait=True, cancel_futures=True)
      self._executor = None
      self._ahead.clear()
    if hasattr(self.items, 'close'):
      self.items.close()

  def __enter__(self) -> 'Staged[Placed, State]':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def stage(
  items: Iterator[tuple[Item, State]], place: Callable[[Item], Placed], depth: int = 2, background: bool = True
) -> Staged[Placed, State]:
  """Runs `items` and `place` ahead of the consumer.

  Args:
    items: pairs of an item, such as a `Batch`, and the state after it.
    place: what to do with each item, such as `jax.device_put`.
    depth: items that are ready or in work beyond the one the consumer holds.
    background: in one thread of its own; False does the same work when the consumer asks for it.

  Returns:
    An iterator of `(place(item), state)` in order. An exception of `items` or `place` is raised in the consumer where
    its item would have come. Use it in a `with`, or call `close()`.
  """
  if depth < 1:
    raise ValueError(f'depth={depth} must be at least 1')
  return Staged(items, place, depth, background)
