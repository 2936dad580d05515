"""The pytrees that everything else is written in terms of."""

from typing import Any

from flax import struct
from jax import Array


@struct.dataclass
class Batch:
  """Examples: numpy arrays on the host, `jax.Array`s on devices. B is the number of examples, padding included."""

  label: Array  # f32[B], 0 or 1
  dense: Array  # f32[B, 13], transformed integers
  bucket: Array  # u32[B, 26], Fingerprint64(string) mod the column's buckets
  weight: Array  # f32[B], 0 for padding: every row of the data counts exactly once
  key: Any = None  # u32[B, 26, 2], low and high half of Fingerprint64(string); None where tables are static


@struct.dataclass
class Table:
  """Embedding rows with everything that lives per row. Every per-row leaf has `rows` as its leading axis."""

  value: Array  # f32[rows, D]
  slots: Any  # optimizer memory: leaves [rows, ...] per row, or [] shared by the table
  scratch: Array  # i32[rows], never cleared and never saved: which lane of the batch won a row (see update.py)


@struct.dataclass
class Directory:
  """Which id lives in which row of a table, how often and how lately it was seen (see embeddings/directory.py).

  A row is free exactly when its frequency is 0; a free row is dead: nothing reads it, and claiming it writes its
  initial value and slots.
  """

  entry: Array  # u32[pages, buckets, 4, ways]: of each row key low, key high, frequency, last step * 32 + feature
  used: Array  # i32[], rows that are not free


@struct.dataclass
class Widths:
  """What the policy of widths remembers of a directory's rows (see embeddings/width.py)."""

  mean: Array  # f32[rows], moving sum of occurrences a period, not yet corrected
  counted: Array  # u32[rows], frequency when the last period ended
  periods: Array  # i32[], that have ended
  least: Array  # f32[blocks], the corrected mean from which on an id has each block


@struct.dataclass
class Counts:
  """What became of the lookups and ids of a directory since training began, by the columns of its table, each number
  modulo 2**32: differences and sums are the host's, see `upkeep`."""

  lookups: Array  # u32[columns], of training
  admitted: Array  # u32[columns], ids that got a row
  refused: Array  # u32[columns], lookups of ids that were not yet admitted
  unplaced: Array  # u32[columns], lookups of ids for which there was no place
  evicted: Array  # u32[columns], ids that lost their row
  asked: Array  # u32[2, columns], lookups and unplaced when it was last asked whether it is time to grow


@struct.dataclass
class Vocabulary:
  """All that a table of embedding variables knows of its ids."""

  directory: Directory
  filter: Any  # what admission remembers of ids that have no row
  widths: Any  # Widths; () where all vectors have their full width
  counts: Counts


@struct.dataclass
class TrainState:
  """All that training changes."""

  step: Array  # i32[]
  params: Any
  batch_stats: Any
  opt_state: Any
  tables: dict[str, Table]
  known: dict[str, Vocabulary]  # of the tables of embedding variables; static ones have none
