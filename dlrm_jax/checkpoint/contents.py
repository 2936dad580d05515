"""What a checkpoint holds, column by column, read without a program, without data and without writing anything."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from configs import base
from dlrm_jax import spec as specs
from dlrm_jax.checkpoint.full import first_line, is_delta, read_json, saved_arrays, states
from dlrm_jax.checkpoint.same_model import CheckpointError
from dlrm_jax.data.schema import CATEGORIES
from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings.adaptive import shared_name
from dlrm_jax.embeddings.layout import TableLayout, static_layout
from dlrm_jax.embeddings.multi_hash import parts_of
from dlrm_jax.structs import Directory

ROWS = 1 << 16  # whose vectors are looked at at once: bounds the memory beside a table


class Ids(NamedTuple):
  """The ids of one column in a directory."""

  row: np.ndarray  # i64[n], ascending
  key: np.ndarray  # u64[n], their fingerprints
  frequency: np.ndarray  # u32[n]
  version: np.ndarray  # i32[n], step of the last training lookup


NOBODY = Ids(*(np.zeros(0, dtype) for dtype in (np.int64, np.uint64, np.uint32, np.int32)))


class Known(NamedTuple):
  """What a table knows of its ids."""

  rows: int  # of the directory, free ones included
  ids: dict[int, Ids]  # by column
  waiting: dict[int, Ids] | None  # by column, those that are not yet admitted; None: a filter that knows no ids
  counts: dict[str, dict[int, int]]  # of lookups and ids, modulo 2**32, by column


class Part(NamedTuple):
  """The rows of one column in a table."""

  column: int
  row: np.ndarray  # i64[n], where their vectors stand in `value`
  value: np.ndarray  # [rows, D], as the table stores it
  ids: Ids | None  # whose rows they are; None: those of the buckets 0, 1, ...

  def vectors(self) -> Iterator[tuple[slice, np.ndarray]]:
    """Float32 vectors of at most `ROWS` rows at once, and which of the rows they are."""
    for start in range(0, len(self.row), ROWS):
      some = slice(start, start + ROWS)
      value = self.value[self.row[some]]
      # As bits.widen, without a compilation for every number of rows.
      yield some, value.view(jnp.bfloat16).astype(np.float32) if value.dtype == np.uint16 else value

  def norms(self) -> np.ndarray:
    """The length of each vector, f32[n]."""
    return np.concatenate([np.linalg.norm(v, axis=1) for _, v in self.vectors()] or [np.zeros(0, np.float32)])


@dataclasses.dataclass(frozen=True)
class Contents:
  """A checkpoint: all small things of it, and the means to read its tables one by one."""

  path: Path
  config: dict[str, Any]  # of the run that wrote it
  spec: specs.Spec  # the same
  position: dict[str, Any]  # of the data
  shapes: dict[str, Any]  # the saved state, as shapes
  step: int

  @property
  def embedding(self) -> specs.EmbeddingSpec:
    """Of the tables as they are saved: those of multi-hash hold the parts of vectors."""
    embedding = self.spec.embedding
    return parts_of(embedding) if embedding.kind == 'multi_hash' else embedding

  def name_of(self, column: int) -> str:
    """C1..C26, and of multi-hash tables which part."""
    part, place = divmod(column, len(CATEGORIES))
    parts = ('remainder', 'quotient') if self.spec.embedding.kind == 'multi_hash' else ('',)
    return f'{CATEGORIES[place]} {parts[part]}'.rstrip()

  @property
  def layout(self) -> dict[str, TableLayout]:
    """The columns of each table, in the order of their first columns."""
    own = static_layout(self.embedding)
    tables = own | {shared_name(name): table for name, table in own.items()}
    return {name: table for name, table in tables.items() if name in self.shapes['tables']}

  def knows_ids(self, name: str) -> bool:
    """Whether a table is one of embedding variables."""
    return name in self.shapes.get('known', {})

  def known(self, name: str) -> Known:
    """Reads the directories of a table of embedding variables."""
    shapes, columns = self.shapes['known'][name], self.layout[name].columns
    counts = {part: shape for part, shape in shapes['counts'].items() if part != 'asked'}
    if any(shape.shape != (len(columns),) for shape in counts.values()):
      raise CheckpointError(f'{self.path} is of another version of this program, which counted ids by table')
    wanted = {'directory': {'entry': shapes['directory']['entry']}, 'counts': counts}
    remembered, waiting = shapes.get('filter') or {}, dict.fromkeys(columns, NOBODY)
    if isinstance(remembered, dict) and remembered:
      wanted['filter'] = {'entry': remembered['entry']}
    tree = self.read({'known': {name: wanted}})['known'][name]
    if 'filter' in tree:
      waiting = ids_by_column(tree['filter']['entry'], columns)
    return Known(
      rows=tree['directory']['entry'].size // 4,
      ids=ids_by_column(tree['directory']['entry'], columns),
      waiting=waiting if isinstance(remembered, dict) else None,
      counts={part: dict(zip(columns, of.tolist(), strict=True)) for part, of in tree['counts'].items()},
    )

  def parts(self, name: str, columns: Collection[int], known: Known | None) -> Iterator[Part]:
    """Some columns of a table, about whose ids `known` tells. Reads the values of the table."""
    wanted = {'tables': {name: {'value': self.shapes['tables'][name]['value']}}}
    value, layout = self.read(wanted)['tables'][name]['value'], self.layout[name]
    for column in columns:
      ids = known and known.ids[column]
      yield Part(column, ids.row if ids else rows_of_buckets(layout, column), value, ids)

  def read(self, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a part of `shapes`."""
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with readable(self.path):
      restore = ocp.args.PyTreeRestore(wanted, args, partial_restore=True)
      return states().restore(epath.Path(self.path / 'state'), args=restore)


def open_checkpoint(folder: Path, step: int | None = None) -> Contents:
  """The newest complete checkpoint, or that of a step.

  Args:
    folder: of a run, of its checkpoints, or of one of them.
    step: of those in the folder.

  Raises CheckpointError, one line, if there is none or if it cannot be read.
  """
  path = find_checkpoint(folder.absolute(), step)
  with readable(path):
    config, position = read_json(path, 'config'), read_json(path, 'position')
    shape = lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    shapes = jax.tree.map(shape, saved_arrays(path))
    contents = Contents(path, config, spec_of(config), position, shapes, 0)
  found = int(contents.read({'step': shapes['step']})['step'])
  if step not in (None, found):
    raise CheckpointError(f'{path} is the checkpoint of step {found}, not of {step}; leave out --step')
  return dataclasses.replace(contents, step=found)


def find_checkpoint(folder: Path, step: int | None) -> Path:
  """The folder of one checkpoint; see `open_checkpoint`."""
  if not folder.is_dir():
    raise CheckpointError(f'{folder} is not a folder; name that of a run, of its checkpoints or of one of them')
  if is_delta(folder):
    raise CheckpointError(f'{folder} has only what changed since another checkpoint; name a whole one')
  if (folder / 'state').is_dir():
    return folder
  if (folder / 'checkpoints').is_dir():
    folder = folder / 'checkpoints'
  with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    steps = sorted(manager.all_steps())
  if not steps:
    raise CheckpointError(f'{folder} has no complete checkpoint')
  if step not in (None, *steps):
    raise CheckpointError(f'{folder} has no checkpoint of step {step}; there are {", ".join(map(str, steps))}')
  return folder / str(steps[-1] if step is None else step)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
  """CheckpointError in place of whatever a damaged file makes the reader raise."""
  try:
    yield
  except Exception as error:
    raise CheckpointError(f'{path} cannot be read, it is damaged or incomplete: {first_line(error)}') from error


def spec_of(config: dict[str, Any]) -> specs.Spec:
  """The spec of a saved config. Fields that came later have the values of configs/base.py."""
  tuples = lambda tree: {
    name: tuples(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
    for name, value in tree.items()
  }
  whole = base.get_config()
  whole.update(tuples(config))
  return specs.from_config(whole)


def ids_by_column(entry: np.ndarray, columns: Sequence[int]) -> dict[int, Ids]:
  """The ids of a directory."""
  entries = jax.tree.map(np.asarray, directories.entries(Directory(entry=jnp.asarray(entry), used=jnp.zeros(()))))
  row = np.flatnonzero(entries.frequency)
  feature = entries.ids.feature[row].astype(np.uint8)
  row = row[np.argsort(feature, kind='stable')]
  key = entries.ids.key[row].astype(np.uint64)
  key = key[:, 0] | key[:, 1] << np.uint64(32)
  ids = row, key, entries.frequency[row], entries.version[row]
  ends = np.cumsum(np.bincount(feature, minlength=directories.FEATURES)).tolist()
  return {column: Ids(*(part[ends[column - 1] if column else 0 : ends[column]] for part in ids)) for column in columns}


def rows_of_buckets(layout: TableLayout, column: int) -> np.ndarray:
  """Where in its table the rows of a column's buckets 0, 1, ... stand, i64[buckets]."""
  place = layout.columns.index(column)
  buckets = layout.buckets[place]

  def rows(start: int) -> np.ndarray:
    # As a batch of which all columns have the bucket; only the row of this one is looked at.
    bucket = np.minimum(np.arange(start, start + ROWS), buckets - 1).astype(np.uint32)
    batch = jnp.broadcast_to(jnp.asarray(bucket)[:, None], (ROWS, specs.COLUMNS))
    return np.asarray(layout.resolve(batch, jnp.ones(ROWS)))[: buckets - start, place]

  return np.concatenate([rows(start) for start in range(0, buckets, ROWS)]).astype(np.int64)
