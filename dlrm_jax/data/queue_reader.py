"""Batches from a shared queue of slices (`work_queue.py`): slices are parsed ahead, shuffled, and cut into batches.

Alone, the batches are a function of (seed, epoch, state), and every one is full but the last of an epoch. With several
processes they depend on how fast each reads: one that falls behind waits for its own parser for a moment, then brings
what it has until it has a whole share again. It never waits for the rows of another.
"""

import collections
import concurrent.futures
import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from dlrm_jax.data.encode import fill, new_batch, pad, width
from dlrm_jax.data.index import FileIndex
from dlrm_jax.data.schema import DataSpec
from dlrm_jax.data.shuffle import Memory, reorder, seeded_order
from dlrm_jax.data.work_queue import Piece, State, WorkQueue
from dlrm_jax.spec import check_shares
from dlrm_jax.structs import Batch

# Seconds that a process waits for its own rows before it brings less than its share.
PATIENCE = 0.1


@runtime_checkable
class Processes(Protocol):
  """The processes that share a queue."""

  index: int  # of this one
  count: int

  def agree(self, number: int) -> list[int]:
    """The numbers of all processes in this round, in their order; waits for them. Raises if one has left.

    It runs in the thread that stages batches, so it must not be a collective operation of JAX: those would meet the
    training step's in another order on each process.
    """

  def leave(self) -> None:
    """Ends the rounds: whoever waits for this process, now or later, raises. Returns at once."""


class _Alone:
  """One process."""

  index, count = 0, 1

  def agree(self, number: int) -> list[int]:
    return [number]

  def leave(self) -> None:
    pass


ALONE = _Alone()


def queue_batches(
  index: FileIndex,
  spec: DataSpec,
  batch_size: int,
  seed: int,
  processes: Processes = ALONE,
  state: State | None = None,
) -> 'QueueIterator':
  """Batches without end from a queue that `processes` share; see `QueueIterator`.

  Args:
    index: the files.
    spec: how to read, cut and shuffle them.
    batch_size: the most examples of the global batch, all processes together.
    seed: of the orders of and within the slices; every epoch has others.
    processes: who shares the queue; all of them do this, with the same arguments.
    state: where to go on, as yielded or from `get_state()`; any batch size and number of processes may go on from it.
  """
  iterator = QueueIterator(index, spec, batch_size, seed, processes)
  if state is not None:
    iterator.set_state(state)
  return iterator


@dataclasses.dataclass
class _Read:
  """A piece of this process, its rows to come, and how many of them are behind it."""

  piece: Piece
  rows: Future
  at: int


class QueueIterator:
  """Yields `(batch, state)` of this process, where `state`, of the whole queue, goes on after that step; never ends.

  Batches have ceil(batch_size / processes) examples. Every row appears once an epoch, in one of the processes, with
  weight 1; the rest of a batch, and rows left out because they are bad, have weight 0.

  Attributes:
    skipped_rows: bad rows of this process left out of the batches so far.
  """

  def __init__(self, index: FileIndex, spec: DataSpec, batch_size: int, seed: int, processes: Processes) -> None:
    check_shares(batch_size, processes.count)
    self._index, self._spec, self._seed, self._processes = index, spec, seed, processes
    self._shares = [
      batch_size * (i + 1) // processes.count - batch_size * i // processes.count for i in range(processes.count)
    ]
    self._threads = max(1, spec.threads)
    self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix='slice')
    self._memory = Memory(width(spec.keys))
    self._reads: collections.deque[_Read] = collections.deque()
    self.skipped_rows = 0
    self.set_state({'epoch': 0, 'position': 0})

  def get_state(self) -> State:
    """Of the queue, after the last batch."""
    return self._queue.state()

  def set_state(self, state: State) -> None:
    """Goes on from a state. All processes do so after the same batch."""
    self._reads.clear()
    self._queue = WorkQueue(self._index.rows, self._spec.slice_rows, self._seed, self._shares, self._threads, state)
    self._steps = 0  # that are left of the round
    self._patient = True

  def __iter__(self) -> 'QueueIterator':
    return self

  def __next__(self) -> tuple[Batch, State]:
    while not self._steps:
      self._steps = self._agree()
    self._steps -= 1
    return self._take(self._queue.step()[self._processes.index]), self._queue.state()

  def _agree(self) -> int:
    """Steps of the next round, perhaps none."""
    for process, piece in self._queue.hand_out():
      if process == self._processes.index:
        self._reads.append(_Read(piece, self._pool.submit(self._parse, piece), piece.done))
    steps = self._queue.plan(self._processes.agree(self._wait()))
    self._patient |= not steps
    return steps

  def _wait(self) -> int:
    """Rows of this epoch that can be brought, once they fill a share or patience ends."""
    wanted, since = self._queue.wanted(self._processes.index), time.monotonic()
    while True:
      ready, late = self._ready()
      if ready >= wanted:
        self._patient = True
        return ready
      patience = None
      if self._processes.count > 1:
        patience = since + PATIENCE - time.monotonic()
        if not self._patient or patience <= 0:
          self._patient = False
          return ready
      concurrent.futures.wait([late], patience)

  def _ready(self) -> tuple[int, Future | None]:
    """Rows of this epoch in a row of parsed pieces, and the first piece that is not."""
    ready = 0
    for read in self._reads:
      if read.piece.epoch != self._queue.epoch:
        break
      if not read.rows.done():
        return ready, read.rows
      ready += read.piece.stop - read.piece.start - read.at
    return ready, None

  def _parse(self, piece: Piece) -> np.ndarray:
    """All rows of a slice `u32[N, width]` in their shuffled order."""
    count = piece.stop - piece.start
    rows = self._index.read(piece.start, piece.stop, self._spec, self._memory.take(count))
    if self._spec.shuffle_rows:
      rows = reorder(rows, seeded_order((self._seed, piece.epoch, 1 + piece.number), count), self._memory)
    return rows

  def _take(self, count: int) -> Batch:
    """The next `count` rows as a padded batch."""
    batch, done = new_batch(max(self._shares), self._spec.keys), 0
    while done < count:
      read = self._reads[0]
      rows = read.rows.result()
      part = rows[read.at : read.at + count - done]
      fill(batch, slice(done, done + len(part)), part)
      done += len(part)
      read.at += len(part)
      if read.at == len(rows):
        self._memory.give(rows)
        self._reads.popleft()
    pad(batch, count)
    self.skipped_rows += int(count - np.count_nonzero(batch.weight))
    return batch

  def close(self) -> None:
    """Ends the threads, and the wait of other processes for this one. Idempotent."""
    self._pool.shutdown(wait=True, cancel_futures=True)
    self._processes.leave()
