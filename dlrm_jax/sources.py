"""The data of a run: what a spec names, opened, and where in it a run stands."""

import dataclasses
import functools
import logging
import os
from typing import Any

import jax

from dlrm_jax.data import pipeline
from dlrm_jax.data.cache import index_cached
from dlrm_jax.data.index import FileIndex, index_files
from dlrm_jax.data.queue_reader import queue_batches
from dlrm_jax.data.schema import DataError, DataSpec
from dlrm_jax.data.stage import Staged, stage
from dlrm_jax.distributed import Members
from dlrm_jax.sharding import ALONE, Axis, of_all
from dlrm_jax.spec import KEYED, Spec
from dlrm_jax.stretches import Stacked

# {'epoch', 'position'}: epochs done, rows of the next one done; and which ones, if they come from a work queue.
Position = dict[str, Any]
START: Position = {'epoch': 0, 'position': 0}
# Batches that are ready ahead of the step: enough to ride out a slow window, little memory.
STAGE_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class Sources:
  """Training and (unless there is no evaluation) evaluation files."""

  reading: DataSpec
  train: FileIndex
  eval: FileIndex | None


def open_sources(spec: Spec) -> Sources:
  """Finds, counts and checks the files. DataError, with file and fix, if something is wrong with them."""
  settings = dataclasses.asdict(spec.data)
  cache = settings.pop('cache')
  reading = DataSpec(
    location=spec.data_location, buckets=spec.embedding.buckets, threads=max(1, spec.inter),
    keys=spec.embedding.kind in KEYED, native=spec.native, **settings,
  )  # fmt: skip

  def index(pattern: str) -> FileIndex:
    if cache:
      return index_cached(pattern, reading, os.path.join(spec.output_dir, 'cache'))
    return index_files(pattern, reading.location, reading.on_bad_row, reading.native)

  sources = Sources(reading, train=index(spec.data.train), eval=None if spec.no_eval else index(spec.data.eval))
  logging.info(
    'data: %s rows to train on, %s to evaluate',
    f'{sources.train.rows:,}', f'{sources.eval.rows:,}' if sources.eval else 'none',
  )  # fmt: skip
  return sources


def check_everywhere(sources: Sources) -> None:
  """DataError, in all processes, if they see other data: one would wait for batches that another does not have."""
  for name, index in (('train', sources.train), ('eval', sources.eval)):
    for process, rows in enumerate(of_all(index.rows if index else 0)):
      if index and rows != index.rows:
        raise DataError(
          f'config.data.{name} has {index.rows:,} rows in process {jax.process_index()} and {rows:,} in process '
          f'{process}; all processes must see the same files'
        )


def train_batches(
  sources: Sources, spec: Spec, position: Position, axis: Axis = ALONE, members: Members | None = None, stack: int = 0
) -> Staged:
  """(batch on the devices, position after it), from `position` on without end. A context manager and iterator.

  With `stack`: (so many batches, the places after each), see `Stacked`.
  """
  if spec.data.workqueue:
    processes = (members or Members()).rounds()
    batches = queue_batches(sources.train, sources.reading, spec.batch_size, spec.seed, processes, position)
  else:
    batches = pipeline.train_batches(
      sources.train, sources.reading, spec.batch_size, spec.seed, jax.process_index(), jax.process_count(), position
    )
  batches = Stacked(batches, stack) if stack else batches
  place = functools.partial(axis.put, multiple=spec.micro_batch, stacked=stack > 1)
  return stage(batches, place, STAGE_DEPTH, background=spec.smartstaged)


def eval_batches(sources: Sources, spec: Spec, axis: Axis = ALONE) -> Staged:
  """(batch on the devices, position after it), once over the evaluation data. A context manager and iterator.

  Every device gets `spec.batch_size` examples, however many devices there are: the same shapes, so the same logits.
  """
  batches = pipeline.eval_batches(
    sources.eval, sources.reading, spec.batch_size * axis.size, jax.process_index(), jax.process_count()
  )
  return stage(batches, axis.put, STAGE_DEPTH, background=spec.smartstaged)


def remaining_batches(sources: Sources, spec: Spec, position: Position) -> int:
  """Batches from `position` to the end of the last of `spec.epochs` epochs.

  If several processes share a work queue, it may take more, since not every batch is full.
  """
  rows = sources.train.rows
  whole = (spec.epochs - position['epoch'] - 1) * pipeline.batches_per_epoch(rows, spec.batch_size)
  return max(0, whole + pipeline.batches_per_epoch(rows - position['position'], spec.batch_size))


def to_saved(sources: Sources, spec: Spec, position: Position) -> dict[str, Any]:
  """A position as it goes into a checkpoint: with what makes it mean the same rows again."""
  names = ('workqueue', 'slice_rows' if spec.data.workqueue else 'streams', 'shuffle_rows')
  order = {**{name: getattr(spec.data, name) for name in names}, 'seed': spec.seed}
  return {**position, 'rows': sources.train.rows, 'order': order}


def from_saved(sources: Sources, spec: Spec, saved: dict[str, Any]) -> Position:
  """Where to go on. DataError if the same data is to be read in another order before its epoch has ended.

  Other data (another number of rows) starts at its beginning: training goes on with the next day's file.
  """
  position = {name: value for name, value in saved.items() if name not in ('rows', 'order')}
  now = to_saved(sources, spec, position)
  if saved['rows'] != now['rows']:
    logging.info('the checkpoint saw %d rows of data, here are %d: from the first row', saved['rows'], now['rows'])
    return START
  for name, value in saved['order'].items():
    if value != now['order'].get(name) and saved['position']:
      field = 'seed' if name == 'seed' else f'data.{name}'
      raise DataError(
        f'the checkpoint is at row {saved["position"]} of an epoch read with config.{field}={value}; with '
        f'{now["order"].get(name)} rows would be lost or repeated. Set it to {value} until the epoch has ended'
      )
  return position
