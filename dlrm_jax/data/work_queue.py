"""A shared queue of slices of the data: each goes to the process that has least left to bring.

The S slices are equal parts of the rows, so files of any sizes balance. An epoch hands them out in a seeded order.

Training is synchronous: all processes do the same steps, and each brings at most its share of the batch, padded with
weight 0. Every few steps the processes agree: each tells one number, how many rows it has parsed, and waits for the
numbers of the others. Everything else follows from these numbers by the same arithmetic in every process: who brings
how many rows in which step, when to agree again, who gets which slice, and where an epoch ends. So there is no server,
no lock and no lease; every process knows the state of the whole queue after each step, and any one can save it.

* A process whose parser is late brings what it has, perhaps nothing, and the others go on: it empties its slices more
  slowly, so it gets fewer. If nobody has any row, all ask again.
* An epoch ends with the step that brings its last row. Slices of the next one may be parsed before, and not brought.
  At the end those who have nothing left bring padding, for as many steps as the last slices take.
* A state counts what was brought, not what was handed out or parsed. So what was taken and not trained at a crash
  returns by itself, at the head of the queue, to however many processes there are then.
"""

import collections
import dataclasses
from typing import Any

import numpy as np

from dlrm_jax.data.schema import DataError
from dlrm_jax.data.shuffle import seeded_order

# {'epoch', 'position': rows of it brought, 'drawn': slices of it begun or passed over, 'open': [[ticket, rows], ...]}:
# the tickets below `drawn` that are not finished, and how many rows of each were brought. Where `position` is 0, the
# rest may be missing.
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Piece:
  """What is left of a slice: rows [start, stop) of the data but the first `done` ones of their shuffled order."""

  epoch: int
  ticket: int  # its place in the order of the epoch
  number: int  # of the slice
  start: int
  stop: int
  done: int


@dataclasses.dataclass
class _Held:
  """A piece that a process has, and the rows of the slice that were brought."""

  piece: Piece
  done: int

  @property
  def left(self) -> int:
    return self.piece.stop - self.piece.start - self.done


class WorkQueue:
  """Who has which slice, and what of it was brought: the same in every process, from the numbers that they agree on.

  A round is `hand_out`, `plan`, and as many `step` as planned.
  """

  def __init__(self, rows: int, slice_rows: int, seed: int, shares: list[int], threads: int, state: State) -> None:
    """Goes on from `state`.

    Args:
      rows: of the data.
      slice_rows: the most rows of a slice.
      seed: of the order of the slices.
      shares: the most rows of a step, of each process.
      threads: slices that a process parses side by side.
      state: of a queue of the same rows, slice_rows and seed, with any shares and threads.
    """
    self._all, self._slices, self._seed, self._shares = rows, -(-rows // slice_rows), seed, shares
    largest = -(-rows // self._slices)
    # Each has a slice in use and some in work; and a round is short beside a slice, so that nobody runs out in it.
    self._enough = threads * largest + max(shares)
    self._most_steps = max(1, largest // (4 * max(shares)))
    self._order = (-1, np.empty(0, np.int64))
    self._hands: list[collections.deque[_Held]] = [collections.deque() for _ in shares]
    self._ready = [0] * len(shares)
    self.epoch, self._position = state['epoch'], state['position']
    drawn, opened = (state['drawn'], state['open']) if self._position else (0, [])
    self._check(drawn, opened)
    self._next = self._place(self.epoch, drawn)
    self._returned = collections.deque(self._piece(self.epoch, ticket, done) for ticket, done in opened)

  def _check(self, drawn: int, opened: list[list[int]]) -> None:
    order = self._order_of(self.epoch)
    sizes = self._start(order + 1) - self._start(order)
    fits = drawn <= len(sizes) and all(ticket < drawn and done < sizes[ticket] for ticket, done in opened)
    if not fits or sizes[:drawn].sum() - sum(sizes[ticket] - done for ticket, done in opened) != self._position:
      raise DataError(
        f'the saved queue has {self._position} rows of an epoch behind it, but its slices have other sizes here, where '
        f'{self._all} rows are cut in {self._slices}; resume with the data and data.slice_rows of the checkpoint'
      )

  def state(self) -> State:
    """After the steps so far."""
    opened = {piece.ticket: piece.done for piece in self._returned}
    for hand in self._hands:
      opened |= {held.piece.ticket: held.done for held in hand if held.piece.epoch == self.epoch}
    drawn = self._next[1] if self._next[0] == self.epoch else self._slices
    while opened.get(drawn - 1) == 0:  # as if it had not been handed out
      drawn -= 1
      del opened[drawn]
    opened = [list(item) for item in sorted(opened.items())]
    return {'epoch': self.epoch, 'position': self._position, 'drawn': drawn, 'open': opened}

  def hand_out(self) -> list[tuple[int, Piece]]:
    """Gives slices to those who have least, until all have enough: (process, what it got)."""
    given = []
    while True:
      held = self._held()
      process = held.index(min(held))
      if held[process] >= self._enough:
        return given
      piece = self._returned.popleft() if self._returned else self._draw()
      self._hands[process].append(_Held(piece, piece.done))
      given.append((process, piece))

  def wanted(self, process: int) -> int:
    """Rows that a process should have parsed before the next step: its share, or all that it has of this epoch."""
    return min(self._shares[process], self._held(self.epoch)[process])

  def plan(self, ready: list[int]) -> int:
    """Steps of this round, from how many rows of this epoch each process has parsed of what it holds.

    As many as all who have rows of this epoch can fill; one, if one of them can fill none; none, if nobody has parsed
    any. Each step brings what is ready, up to the share.
    """
    self._ready = list(ready)
    held = self._held(self.epoch)
    full = min(rows // share for rows, share, some in zip(ready, self._shares, held, strict=True) if some)
    return min(max(full, int(any(ready))), self._most_steps)

  def step(self) -> list[int]:
    """Rows that each process brings in the next step."""
    brought = [min(rows, share) for rows, share in zip(self._ready, self._shares, strict=True)]
    for process, (hand, rows) in enumerate(zip(self._hands, brought, strict=True)):
      self._ready[process] -= rows
      while rows:
        part = min(rows, hand[0].left)
        hand[0].done += part
        rows -= part
        if not hand[0].left:
          hand.popleft()
    self._position += sum(brought)
    if self._position == self._all:
      self.epoch, self._position = self.epoch + 1, 0
    return brought

  def _held(self, epoch: int | None = None) -> list[int]:
    """Rows that each process has still to bring, in all or of one epoch."""
    return [sum(held.left for held in hand if epoch in (None, held.piece.epoch)) for hand in self._hands]

  def _draw(self) -> Piece:
    epoch, ticket = self._next
    self._next = self._place(epoch, ticket + 1)
    return self._piece(epoch, ticket, 0)

  def _place(self, epoch: int, ticket: int) -> tuple[int, int]:
    return (epoch, ticket) if ticket < self._slices else (epoch + 1, 0)

  def _piece(self, epoch: int, ticket: int, done: int) -> Piece:
    number = int(self._order_of(epoch)[ticket])
    return Piece(epoch, ticket, number, self._start(number), self._start(number + 1), done)

  def _start(self, number: Any) -> Any:
    """First row of a slice, or of each of several."""
    return self._all * number // self._slices

  def _order_of(self, epoch: int) -> np.ndarray:
    if self._order[0] != epoch:
      # The third number keeps this apart from the orders within the slices, where it is never 0.
      self._order = (epoch, seeded_order((self._seed, epoch, 0), self._slices))
    return self._order[1]
