"""Vectors of a checkpoint as Parquet: of embedding variables by their ids, of static tables by their buckets."""

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from dlrm_jax.checkpoint.contents import Contents, Part

OF_IDS = {'feature': pa.string(), 'key': pa.uint64(), 'frequency': pa.uint32(), 'version': pa.int32()}
OF_BUCKETS = {'column': pa.string(), 'row': pa.int64()}


class Export:
  """Files that parts are written to, one row group for at most `contents.ROWS` rows. A context manager.

  One file; for an adaptive checkpoint, which has both kinds of rows, a second one for those of buckets, beside it. They
  have their names once all is written.
  """

  def __init__(self, path: Path, contents: Contents) -> None:
    self._dim, self._name_of = contents.embedding.dim, contents.name_of
    shared = path.with_name(f'{path.stem}.shared{path.suffix}') if contents.shapes.get('known') else path
    self._paths = {True: path, False: shared}  # by whether they are rows of ids
    self._writers: dict[bool, parquet.ParquetWriter] = {}
    if path.resolve().is_relative_to(contents.path.resolve()):
      raise OSError(f'{path} is in the folder of the checkpoint, into which nothing is written; choose another')
    for each in self._paths.values():
      if each.is_dir():
        raise OSError(f'{each} is a folder; name a file')

  def __enter__(self) -> 'Export':
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
    for of_ids, writer in self._writers.items():
      writer.close()
      partial = _partial(self._paths[of_ids])
      if error:
        partial.unlink()
      else:
        partial.replace(self._paths[of_ids])

  def write(self, part: Part) -> None:
    """All rows of a part."""
    of_ids = part.ids is not None
    schema = _schema(OF_IDS if of_ids else OF_BUCKETS, self._dim)
    if of_ids not in self._writers:
      self._writers[of_ids] = parquet.ParquetWriter(_partial(self._paths[of_ids]), schema)
    buckets = np.arange(len(part.row))
    fields = (part.ids.key, part.ids.frequency, part.ids.version) if of_ids else (buckets,)
    for some, vectors in part.vectors():
      name = pa.array([self._name_of(part.column)] * len(vectors))
      flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
      arrays = [name, *(pa.array(field[some]) for field in fields), pa.FixedSizeListArray.from_arrays(flat, self._dim)]
      self._writers[of_ids].write_batch(pa.record_batch(arrays, schema=schema))


def _schema(fields: dict[str, pa.DataType], dim: int) -> pa.Schema:
  return pa.schema([*fields.items(), ('vector', pa.list_(pa.float32(), dim))])


def _partial(path: Path) -> Path:
  return path.with_name(f'{path.name}.partial')
