"""Which row of the data stands at which position of an epoch: integers only, no files.

Rows 0..N-1 are cut into S contiguous streams, stream s having `(N - s + S - 1) // S` rows. Position p of an epoch is
row p // S of stream p % S, after that stream's shuffle. So every position below N is one row, whatever N and S; batch t
of size B is the positions [t B, (t + 1) B); and process i of P serves the streams from i S // P to (i + 1) S // P, so
that the global batch does not depend on P. If B is a multiple of S, each stream has B // S places in the batch, one
after another, and the order of the examples does not depend on P either, so neither do the bits of sums (sums.py).
"""

import dataclasses
import functools

from dlrm_jax.spec import check_streams

# Rows that are read at once where nothing is shuffled.
READ_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Window:
  """Rows [start, stop) of a stream, which are shuffled together."""

  stream: int
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """The order of `rows` rows in `streams` streams, and the share of one process."""

  rows: int
  streams: int
  shuffle_rows: int
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self) -> None:
    check_streams(self.streams, self.process_count)

  @functools.cached_property
  def local(self) -> range:
    """The streams of this process."""
    start, stop = (i * self.streams // self.process_count for i in (self.process_index, self.process_index + 1))
    return range(start, stop)

  def stream_rows(self, stream: int) -> int:
    """Rows of a stream."""
    return (self.rows - stream + self.streams - 1) // self.streams

  def stream_start(self, stream: int) -> int:
    """First row of the data that belongs to a stream."""
    return stream * (self.rows // self.streams) + min(stream, self.rows % self.streams)

  def local_count(self, position: int) -> int:
    """Positions below `position` that belong to this process."""
    row, stream = divmod(position, self.streams)
    return row * len(self.local) + len(range(self.local.start, min(stream, self.local.stop)))

  def local_size(self, batch_size: int) -> int:
    """The most positions of a batch that any process has: what every process pads its share to."""
    whole, rest = divmod(batch_size, self.streams)
    most = -(-self.streams // self.process_count)  # streams of a process
    # The rest is of streams that stand beside each other, which may all be of one process.
    return whole * most + min(rest, most)

  def window(self, stream: int, row: int) -> Window:
    """The window of a stream that holds one of its rows.

    A window has `shuffle_rows` rows, the first one up to twice as many (later streams have longer ones, so that the
    streams do not all need a new window at once), and so has the last one, which takes what is left over.
    """
    size = self.shuffle_rows or READ_ROWS
    rows = self.stream_rows(stream)
    first = size + stream * size // self.streams
    last = max((rows - first) // size, 0)  # windows are 0..last
    number = 0 if row < first else min(1 + (row - first) // size, last)
    start = first + (number - 1) * size if number else 0
    return Window(stream, start, rows if number == last else first + number * size)

  def schedule(self, row: int = 0) -> list[Window]:
    """This process's windows in the order in which rows `row` and after of its streams need them."""
    windows = []
    for stream in self.local:
      at = row
      while at < self.stream_rows(stream):
        windows.append(self.window(stream, at))
        at = windows[-1].stop
    return sorted(windows, key=lambda window: (max(window.start, row), window.stream))
