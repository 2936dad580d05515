"""An Arrow cache of a file's parsed columns: parsed once, mapped into memory from then on.

The cache of data/train.csv is data/.dlrm_jax_cache/train.csv.arrow; where nothing can be written there, it is in a
folder of the caller's choice. It is an Arrow IPC file, uncompressed, of all that `Columns` has: label and good as u8,
I1..I13 as f32, which of them are missing as the bits of a u16, C1..C26 as the u64 Fingerprint64. So it serves every
transform, every number of buckets and every order of the rows, and gives the same batches as the file, bit for bit.

Its metadata hold what it was made from (see `_stamp`) and the sums of its columns. Both are compared whenever it is
opened, which reads all of it once, as opening a CSV does. A cache that does not fit is written again, and the log says
why. It appears under its name when it is complete, and processes that share it wait for the one that writes it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
from typing import BinaryIO

import grain
import numpy as np
import pyarrow as pa

from dlrm_jax.data.encode import DENSE, Columns
from dlrm_jax.data.index import File, FileIndex, find_files, index_file
from dlrm_jax.data.schema import CATEGORIES, INTEGERS, LABEL, DataError, DataSpec
from dlrm_jax.locks import wait_for_lock

FOLDER = '.dlrm_jax_cache'

# To be raised whenever other values are parsed from the same file, or stored in another way.
VERSION = 1

# Rows of a record batch.
ROWS = 1 << 16

# What is compared of a file's content: so many blocks of so many bytes, spread over the file; all of it if it is small.
SAMPLES, SAMPLE_BYTES = 64, 1 << 14

_SCHEMA = pa.schema(
  [
    (LABEL, pa.uint8()),
    *((name, pa.float32()) for name in INTEGERS),
    ('missing', pa.uint16()),
    *((name, pa.uint64()) for name in CATEGORIES),
    ('good', pa.uint8()),
  ]
)
_ROW_BYTES = sum(field.type.bit_width for field in _SCHEMA) // 8

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

_logger = logging.getLogger(__name__)


class _UnfitError(DataError):
  """A cache that is missing, damaged or made from something else."""


@dataclasses.dataclass(frozen=True)
class CachedRows:
  """One record batch of a cache; to a `FileIndex`, a file."""

  rows: int
  columns: Columns

  def read(self, start: int, stop: int, on_bad_row: str) -> Columns:
    """Views of rows [start, stop). Bad rows were reported when the cache was opened."""
    del on_bad_row
    label, integers, missing, hashes, good = self.columns
    part = slice(start, stop)
    integers, hashes = [values[part] for values in integers], [values[part] for values in hashes]
    return Columns(label[part], integers, missing[part], hashes, good[part])


def index_cached(pattern: str, spec: DataSpec, folder: str) -> FileIndex:
  """Like `index_files`, but reads through caches, which are written first where there are none that fit.

  Args:
    pattern: names or globs, as for `index_files`.
    spec: where the files are, what to do at a bad row, and how many threads parse.
    folder: for the caches of files beside which nothing can be written.

  Raises:
    DataError: as `index_files`; and for every bad row, wherever it is, unless the spec skips them.
  """
  paths = find_files(pattern, spec.location)
  return FileIndex([batch for path in paths for batch in _open(path, spec, folder)])


def _open(path: str, spec: DataSpec, folder: str) -> list[CachedRows]:
  """The rows of one file, from its cache."""
  stamp, places = _stamp(path), _places(path, folder)
  batches = _find(places, stamp) or _make(path, places, stamp, spec)
  bad = np.flatnonzero(~np.concatenate([batch.columns.good for batch in batches]))
  if len(bad) and spec.on_bad_row == 'error':
    index_file(path, 'error').read(int(bad[0]), int(bad[0]) + 1, 'error')  # says what is wrong with it
  if len(bad):
    _logger.warning('%s: %d bad rows are left out, the first of them row %d', path, len(bad), bad[0] + 1)
  return batches


def _places(path: str, folder: str) -> tuple[str, str]:
  """Where the cache of a file may be, the better place first."""
  parent, name = os.path.split(os.path.abspath(path))
  digest = hashlib.blake2b(parent.encode(), digest_size=6).hexdigest()
  return os.path.join(parent, FOLDER, f'{name}.arrow'), os.path.join(folder, f'{name}-{digest}.arrow')


def _stamp(path: str) -> dict[str, int | str]:
  """What a cache of the file as it is now must have been made from."""
  with open(path, 'rb', buffering=0) as file:
    status = os.fstat(file.fileno())
    digest, end = hashlib.blake2b(digest_size=16), status.st_size
    starts = np.linspace(0, max(end - SAMPLE_BYTES, 0), SAMPLES).astype(np.int64)
    small = end <= SAMPLES * SAMPLE_BYTES
    for start in range(0, end, SAMPLE_BYTES) if small else starts.tolist():
      digest.update(os.pread(file.fileno(), SAMPLE_BYTES, start))
  return {
    'version': VERSION,
    'name': os.path.basename(path),
    'bytes': status.st_size,
    'mtime_ns': status.st_mtime_ns,
    'digest': digest.hexdigest(),
  }


def _find(places: tuple[str, str], stamp: dict[str, int | str]) -> list[CachedRows]:
  """The rows of the first cache that fits; none if none does."""
  for cache in places:
    with contextlib.suppress(_UnfitError):
      batches = _load(cache, stamp)
      _logger.info('cache: %s rows from %s', f'{sum(batch.rows for batch in batches):,}', cache)
      return batches
  return []


def _load(cache: str, stamp: dict[str, int | str]) -> list[CachedRows]:
  """The rows of a cache, all of them checked. Raises `_UnfitError`, which says what is wrong with it."""
  if not os.path.exists(cache):
    raise _UnfitError(f'there is no {cache} yet')
  try:
    reader = pa.ipc.open_file(pa.memory_map(cache))
    made_from = json.loads((reader.schema.metadata or {}).get(b'made_from', b'null'))
    if made_from != stamp:
      raise _UnfitError(f'{cache} was made from {made_from}, but now there is {stamp}')
    if not reader.schema.equals(_SCHEMA):
      raise _UnfitError(f'{cache} is damaged (its schema is wrong)')
    batches = [_checked(cache, *reader.get_batch_with_custom_metadata(i)) for i in range(reader.num_record_batches)]
    rows = int(reader.schema.metadata[b'rows'])
  except (pa.ArrowException, OSError, KeyError, ValueError) as error:
    raise error if isinstance(error, _UnfitError) else _UnfitError(f'{cache} is damaged ({error})') from error
  if rows != sum(batch.rows for batch in batches):
    raise _UnfitError(f'{cache} is damaged (rows are missing)')
  return batches


def _checked(cache: str, batch: pa.RecordBatch, metadata: pa.KeyValueMetadata | None) -> CachedRows:
  arrays = [column.to_numpy() for column in batch.columns]
  if metadata is None or json.loads(metadata.get(b'sums', b'null')) != _sums(arrays):
    raise _UnfitError(f'{cache} is damaged (its sums are wrong)')
  columns = Columns(arrays[0], arrays[DENSE], arrays[DENSE.stop], arrays[DENSE.stop + 1 : -1], arrays[-1].view(bool))
  return CachedRows(batch.num_rows, columns)


def _sums(arrays: list[np.ndarray]) -> list[int]:
  """Of each column, the sum of its bits as unsigned numbers, modulo 2**64."""
  return [int(array.view(f'u{array.itemsize}').sum(dtype=np.uint64)) for array in arrays]


def _make(path: str, places: tuple[str, str], stamp: dict[str, int | str], spec: DataSpec) -> list[CachedRows]:
  """Writes the cache where it can be written, unless another process has just done so."""
  for cache in places:
    try:
      os.makedirs(os.path.dirname(cache), exist_ok=True)
      with open(f'{cache}.lock', 'w') as file:
        locked = wait_for_lock(file.fileno(), f'writes {cache}')
        try:
          return _load(cache, stamp)
        except _UnfitError as unfit:
          _logger.info('cache: %s', unfit)
        _write(path, cache, locked, stamp, spec)
        return _load(cache, stamp)
    except OSError as error:
      if error.errno not in _NOT_WRITABLE or cache == places[-1]:
        raise DataError(
          f'{cache}, the cache of {path}, cannot be written ({error.strerror}); make that possible, or set '
          'data.cache=False'
        ) from error
      _logger.info('cache: not in %s (%s)', os.path.dirname(cache), error.strerror)
  raise AssertionError(places)


def _write(path: str, cache: str, locked: bool, stamp: dict[str, int | str], spec: DataSpec) -> None:
  """Parses the file into a cache, which then takes its name at once."""
  file = index_file(path, spec.on_bad_row, spec.native)
  need, free = file.rows * _ROW_BYTES, shutil.disk_usage(os.path.dirname(cache)).free
  if need > free:
    raise DataError(
      f'{cache}, the cache of {path}, needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; '
      'make room, or set data.cache=False'
    )
  _logger.info('cache: writing %s rows (%s MB) to %s', f'{file.rows:,}', f'{need / 1e6:,.0f}', cache)
  # With a lock the name is the same every time, so that what a killed process leaves is written over.
  unfinished = f'{cache}.{socket.gethostname()}{"" if locked else f"-{os.getpid()}"}.tmp'
  try:
    with open(unfinished, 'wb') as sink:
      _write_batches(file, sink, stamp, spec)
      sink.flush()
      os.fsync(sink.fileno())
    if _stamp(path) != stamp:
      raise DataError(f'{path} was changed while its cache was written; start again')
    os.replace(unfinished, cache)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(unfinished)
  _logger.info('cache: written')


def _write_batches(file: File, sink: BinaryIO, stamp: dict[str, int | str], spec: DataSpec) -> None:
  schema = _SCHEMA.with_metadata({'made_from': json.dumps(stamp), 'rows': str(file.rows)})
  starts = grain.MapDataset.range(0, file.rows, ROWS)
  parsed = starts.map(lambda start: file.read(int(start), min(int(start) + ROWS, file.rows), spec.on_bad_row))
  options = grain.ReadOptions(num_threads=spec.threads, prefetch_buffer_size=2 * spec.threads)
  with pa.ipc.new_file(sink, schema) as writer:
    for columns in parsed.to_iter_dataset(options):
      label, integers, missing, hashes, good = columns
      arrays = [label, *integers, missing, *hashes, good.view(np.uint8)]
      batch = pa.record_batch([pa.array(array) for array in arrays], schema=schema)
      writer.write_batch(batch, custom_metadata={'sums': json.dumps(_sums(arrays))})
