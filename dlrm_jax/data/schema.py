"""The columns of the Criteo format, the settings of the reader, and its one kind of error."""

import dataclasses

LABEL = 'label'
INTEGERS = tuple(f'I{i}' for i in range(1, 14))
CATEGORIES = tuple(f'C{i}' for i in range(1, 27))
COLUMNS = (LABEL, *INTEGERS, *CATEGORIES)

# The seed's empty field is a single space, an ordinary id with a trainable row of its own.
MISSING = b' '

# The seed's constants, minima and ranges over train.csv and eval.csv together.
DENSE_MIN = (0, -3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
DENSE_RANGE = (1539, 22069, 65535, 561, 2655388, 233523, 26297, 5106, 24376, 9, 181, 1807, 6879)

DENSE_TRANSFORMS = ('log', 'minmax', 'none')
ON_BAD_ROW = ('error', 'skip')


class DataError(ValueError):
  """Input that cannot be read as it is; the message names file, line and field, and says what to do."""


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """How files become batches.

  Attributes:
    location: folder of the files.
    train: file names or globs under `location`, separated by commas; `.parquet` files are Parquet, all others CSV.
    eval: the same for evaluation.
    streams: logical streams that the order of the training data belongs to, whatever the number of processes.
    shuffle_rows: rows of a window that are shuffled together within a stream; 0 for file order within each stream.
    workqueue: whether the training data is cut into slices that the processes take from a queue, instead of streams.
    slice_rows: the most rows of such a slice, which are shuffled together unless shuffle_rows is 0.
    dense_transform: 'log' is sign(x) log1p(|x|), 'minmax' is (x - min) / range with the seed's constants, or 'none'.
    on_bad_row: 'error' stops at a bad row, 'skip' drops it and counts it.
    threads: threads that parse ahead; 0 parses when rows are needed.
    buckets: rows of each of the 26 categories' tables.
    keys: whether batches carry the whole fingerprints of the categories, too.
    native: whether C++ may parse CSV and pack rows.
  """

  location: str
  buckets: tuple[int, ...]
  train: str = 'train.csv'
  eval: str = 'eval.csv'
  streams: int = 16
  shuffle_rows: int = 20480
  workqueue: bool = False
  slice_rows: int = 20480
  dense_transform: str = 'log'
  on_bad_row: str = 'error'
  threads: int = 1
  keys: bool = False
  native: bool = True
