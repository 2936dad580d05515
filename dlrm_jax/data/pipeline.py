"""Files to batches: windows of rows are parsed ahead in Grain's threads, shuffled, interleaved and sliced.

Every batch is a function of (seed, epoch, position) and the files, so two integers are the whole state. Elements of the
Grain source are windows of tens of thousands of rows: one element a row would cost more than all the rest together.
"""

import sys
from typing import NamedTuple

import grain
import jax
import numpy as np

from dlrm_jax.data.encode import WEIGHT, WIDTH, fill, new_batch, pad, to_batch, width
from dlrm_jax.data.index import FileIndex
from dlrm_jax.data.layout import READ_ROWS, Layout, Window
from dlrm_jax.data.schema import DataError, DataSpec
from dlrm_jax.data.shuffle import Memory, reorder, seeded_order
from dlrm_jax.structs import Batch

State = dict[str, int]

_NOTHING = np.empty((1, 0, WIDTH), np.uint32)


def batches_per_epoch(rows: int, batch_size: int) -> int:
  """Batches of one pass over `rows` rows, the last one perhaps padded."""
  return -(-rows // batch_size)


def train_batches(
  index: FileIndex,
  spec: DataSpec,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  state: State | None = None,
) -> 'TrainIterator':
  """Shuffled batches without end; see `TrainIterator`.

  Args:
    index: the files.
    spec: how to read and shuffle them.
    batch_size: examples of the global batch, all processes together.
    seed: of the shuffle; every epoch has another order.
    process_index: which share of each batch to yield.
    process_count: shares; at most `spec.streams`.
    state: where to go on, as yielded or from `get_state()`; any batch size and number of processes may go on from it.
  """
  layout = Layout(index.rows, spec.streams, spec.shuffle_rows, process_index, process_count)
  iterator = TrainIterator(index, spec, layout, batch_size, seed)
  if state is not None:
    iterator.set_state(state)
  return iterator


def eval_batches(
  index: FileIndex, spec: DataSpec, batch_size: int, process_index: int = 0, process_count: int = 1
) -> 'EvalIterator':
  """One pass in the order of the files, without shuffle; process i has the i-th part of each batch's rows."""
  return EvalIterator(index, spec, batch_size, process_index, process_count)


class _Rows(NamedTuple):
  """A window and its packed rows, shuffled."""

  window: Window
  rows: np.ndarray


class _WindowSource(grain.sources.RandomAccessDataSource):
  """Element k is the k-th window that this process needs from row `row` of its streams in `epoch` on, without end."""

  def __init__(
    self, index: FileIndex, spec: DataSpec, layout: Layout, memory: Memory, seed: int, epoch: int, row: int
  ) -> None:
    self._index, self._spec, self._layout, self._memory = index, spec, layout, memory
    self._seed, self._epoch = seed, epoch
    self._first, self._every = layout.schedule(row), layout.schedule()

  def __len__(self) -> int:
    return sys.maxsize if self._every else 0

  def __getitem__(self, k: int) -> _Rows:
    epoch = self._epoch
    if k < len(self._first):
      window = self._first[k]
    else:
      epochs, number = divmod(k - len(self._first), len(self._every))
      epoch, window = epoch + 1 + epochs, self._every[number]
    first, count = self._layout.stream_start(window.stream) + window.start, window.stop - window.start
    rows = self._index.read(first, first + count, self._spec, self._memory.take(count))
    if self._spec.shuffle_rows:
      rows = reorder(rows, permutation(self._seed, epoch, window), self._memory)
    return _Rows(window, rows)


def permutation(seed: int, epoch: int, window: Window) -> np.ndarray:
  """The order of a window's rows, a function of (seed, epoch, stream, first row)."""
  return seeded_order((seed, epoch, window.stream, window.start), window.stop - window.start)


def _read_ahead(source: grain.sources.RandomAccessDataSource, spec: DataSpec) -> grain.DatasetIterator:
  options = grain.ReadOptions(num_threads=spec.threads, prefetch_buffer_size=2 * spec.threads)
  return iter(grain.MapDataset.source(source).to_iter_dataset(options))


class TrainIterator(grain.DatasetIterator):
  """Yields `(batch, state)`, where `state` goes on after that batch; never ends.

  Every row appears once an epoch, with weight 1; the end of the epoch's last batch, and rows left out because they are
  bad, have weight 0. Examples stand as `layout` says. The same state gives the same batches, whatever was read before.

  Attributes:
    skipped_rows: bad rows of this process left out of the batches so far.
  """

  def __init__(self, index: FileIndex, spec: DataSpec, layout: Layout, batch_size: int, seed: int) -> None:
    super().__init__()
    self._index, self._spec, self._layout, self._seed = index, spec, layout, seed
    self._batch_size, self._local_size = batch_size, layout.local_size(batch_size)
    self._width = width(spec.keys)
    self._memory = Memory(self._width)
    self._block = _NOTHING
    self._windows: dict[int, _Rows] = {}
    self.skipped_rows = 0
    self.set_state({'epoch': 0, 'position': 0})

  def get_state(self) -> State:
    """Epoch, and positions of the epoch consumed: where the next batch begins."""
    return {'epoch': self._epoch, 'position': self._position}

  def set_state(self, state: State) -> None:
    """Goes on from a state; reads only the windows that are current there, and those not before the next batch."""
    epoch, position = state['epoch'], state['position']
    if not 0 <= position < self._layout.rows:
      raise DataError(
        f'the saved position is row {position} of an epoch, but the data has {self._layout.rows} rows; '
        'resume with the data that the checkpoint was trained on'
      )
    self._close_reader()
    self._epoch, self._position = epoch, position
    self._start_epoch()
    self._row, rest = divmod(position, self._layout.streams)
    self._has_places &= rest == 0
    self._drop = self._layout.local_count(position) - self._layout.local_count(self._row * self._layout.streams)
    if self._layout.local_count(position) == self._layout.local_count(self._layout.rows):
      # The others have what is left of the epoch: this process needs no more windows of it.
      self._row, self._drop = self._layout.stream_rows(0), 0

  def _start_epoch(self) -> None:
    self._has_places = self._batch_size % self._layout.streams == 0  # every stream, in every batch, see `layout`
    self._row = 0  # the next row of each stream that will be put into a block
    self._drop = 0  # rows of the next block that were consumed before
    self._give_block()
    for stream in list(self._windows):
      self._give_window(stream)

  def _close_reader(self) -> None:
    for parent in self._parents:
      parent.close()
    self._parents = ()

  def __next__(self) -> tuple[Batch, State]:
    self._assert_not_closed()
    if not self._parents:
      source = _WindowSource(self._index, self._spec, self._layout, self._memory, self._seed, self._epoch, self._row)
      self._parents = (_read_ahead(source, self._spec),)
    stop = min(self._position + self._batch_size, self._layout.rows)
    batch = self._take(self._layout.local_count(stop) - self._layout.local_count(self._position))
    self._position = stop
    if stop == self._layout.rows:
      self._epoch, self._position = self._epoch + 1, 0
      self._start_epoch()
    return batch, self.get_state()

  def _take(self, count: int) -> Batch:
    """The next `count` rows of this process as a padded batch."""
    batch, streams, places, done, at = new_batch(self._local_size, self._spec.keys), 1, count, 0, 0
    if self._has_places:
      streams, places = len(self._layout.local), self._batch_size // self._layout.streams
    if count < self._local_size:
      pad(batch, 0)
    grid = jax.tree.map(lambda values: values[: streams * places].reshape(streams, places, *values.shape[1:]), batch)
    while done < count:
      if not self._block.shape[1]:
        self._give_block()
        self._block = self._next_block()
      rows, self._block = self._block[:, : places - at], self._block[:, places - at :]
      fill(grid, (slice(rows.shape[0]), slice(at, at + rows.shape[1])), rows)
      done, at = done + rows.shape[0] * rows.shape[1], at + rows.shape[1]
    self.skipped_rows += int(count - np.count_nonzero(batch.weight))
    return batch

  def _next_block(self) -> np.ndarray:
    """Rows from `_row` to where the first of this process's streams needs another window: `u32[streams, rows, width]`,
    or, if a stream has no places of its own, `u32[1, rows, width]`, interleaved."""
    streams = [stream for stream in self._layout.local if self._row < self._layout.stream_rows(stream)]
    for stream in streams:
      if stream not in self._windows or self._windows[stream].window.stop <= self._row:
        self._give_window(stream)
        self._windows[stream] = next(self._parent)
    held = [self._windows[stream] for stream in streams]
    # The cap keeps a block to the size of a window where the streams are so short that all have only one.
    cap = self._row + max((self._spec.shuffle_rows or READ_ROWS) // self._layout.streams, 1)
    stop = min(cap, *(window.stop for window, _ in held))
    count, drop = stop - self._row, self._drop
    block = self._memory.take(len(streams) * count)
    if self._has_places:
      out = by_stream = block.reshape(len(streams), count, -1)
    else:
      out, by_stream = block[None, drop:], block.reshape(count, len(streams), -1).transpose(1, 0, 2)
    for i, (window, rows) in enumerate(held):
      by_stream[i] = rows[self._row - window.start : stop - window.start]
    self._row, self._drop = stop, 0
    return out

  def _give_block(self) -> None:
    block, self._block = self._block, _NOTHING
    if block is not _NOTHING:
      self._memory.give(block)

  def _give_window(self, stream: int) -> None:
    if stream in self._windows:
      self._memory.give(self._windows.pop(stream).rows)


class _EvalSource(grain.sources.RandomAccessDataSource):
  """Element k is the k-th group of batches: this process's packed rows of each of them."""

  def __init__(self, index: FileIndex, spec: DataSpec, batch_size: int, process_index: int, process_count: int) -> None:
    self._index, self._spec, self._batch_size = index, spec, batch_size
    self._process_index, self._process_count = process_index, process_count
    self.share = -(-batch_size // process_count)
    self._group = batch_size * max(READ_ROWS // batch_size, 1)

  def __len__(self) -> int:
    return (self._index.rows + self._group - 1) // self._group

  def __getitem__(self, k: int) -> list[np.ndarray]:
    start, stop = k * self._group, min((k + 1) * self._group, self._index.rows)
    if self._process_count == 1:
      rows = self._index.read(start, stop, self._spec)
      return [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
    return [self._read_share(at, min(at + self._batch_size, stop)) for at in range(start, stop, self._batch_size)]

  def _read_share(self, start: int, stop: int) -> np.ndarray:
    begin = start + self._process_index * self.share
    end = min(begin + self.share, stop)
    return self._index.read(begin, end, self._spec) if begin < end else np.empty((0, width(self._spec.keys)), np.uint32)


class EvalIterator(grain.DatasetIterator):
  """Yields `(batch, state)` once over the rows in the order of the files.

  Attributes:
    skipped_rows: bad rows of this process left out of the batches so far.
  """

  def __init__(
    self, index: FileIndex, spec: DataSpec, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> None:
    source = _EvalSource(index, spec, batch_size, process_index, process_count)
    super().__init__(_read_ahead(source, spec))
    self._share = source.share
    self._rows, self._batch_size = index.rows, batch_size
    self.skipped_rows = 0
    self.set_state({'epoch': 0, 'position': 0})

  def get_state(self) -> State:
    """Rows of the data consumed."""
    return {'epoch': 0, 'position': self._position}

  def set_state(self, state: State) -> None:
    """Goes on from a state of an iterator with the same batch size."""
    self._position = state['position']
    self._group: list[np.ndarray] = []
    # A position inside a batch is the end of the last one, which has fewer rows.
    group, self._done = divmod(-(-self._position // self._batch_size), max(READ_ROWS // self._batch_size, 1))
    self._parent.set_state({'next_index': group})

  def __next__(self) -> tuple[Batch, State]:
    self._assert_not_closed()
    while not self._group:
      self._group = next(self._parent)[self._done :]
      self._done = 0
    rows = self._group.pop(0)
    self.skipped_rows += int(np.count_nonzero(rows[:, WEIGHT] == 0))
    self._position = min(self._position + self._batch_size, self._rows)
    return to_batch(rows, self._share), self.get_state()
