"""Checkpoints with Orbax: state, data position and config together. A resumed run equals an unstopped one.

Between whole ones there may be deltas (see delta.py), each of which stands for the whole one that it is based on with
what changed since.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization

from dlrm_jax import spec as specs
from dlrm_jax import upkeep
from dlrm_jax.checkpoint import delta, digest
from dlrm_jax.checkpoint.same_model import CheckpointError, check_same_model
from dlrm_jax.program import Program
from dlrm_jax.sharding import of_all, of_first
from dlrm_jax.spec import Spec
from dlrm_jax.state import abstract_state, state_placing
from dlrm_jax.structs import TrainState

DELTAS, DELTAS_KEPT = 'deltas', 2
TEXTS = 'position and config'  # among the digests of arrays


class Base(NamedTuple):
  """The whole checkpoint that deltas are based on."""

  step: int
  before: delta.Before


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds."""

  step: int
  state: TrainState
  position: dict[str, Any]  # of the data, after the last trained batch
  spec: dict[str, Any]  # of the run that wrote it
  base: Base | None  # what further deltas are based on


class Checkpoints:
  """The checkpoints of one run, under `folder`/<step>, the newest `keep` of them (0: all). A context manager.

  Those of what changed are under `folder`/deltas/<step>. `failed` is told in one line, on a thread of Orbax's, when a
  write has failed in this process: Orbax would let all processes wait for each other for twenty minutes.
  """

  def __init__(self, folder: Path, keep: int, failed: Callable[[str], object] = lambda line: None) -> None:
    self.folder, self._tell = folder.absolute(), failed
    self._has_failed = False
    self._whole = self._manager(self.folder, keep)
    # Made when there is something to write or to read. All processes see the same: it is made in the middle of a run.
    has_deltas = of_first((self.folder / DELTAS).is_dir())
    self._deltas = self._manager(self.folder / DELTAS, DELTAS_KEPT) if has_deltas else None
    self._base: Base | None = None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    for manager in self._managers():
      # After a write that has failed it would only raise the same again.
      with contextlib.suppress(Exception) if self._has_failed else contextlib.nullcontext():
        manager.close()

  def _manager(self, folder: Path, keep: int) -> ocp.CheckpointManager:
    # Embeddings hardly compress: without compression a save takes a fifth of the time.
    handlers = {'state': ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)}
    handlers |= {item: ocp.JsonCheckpointHandler() for item in ('position', 'config', 'digest', 'base')}
    for handler in handlers.values():
      _watch(handler, lambda error: self._tell(self._words(error)))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep or None, create=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder, item_handlers=handlers, options=options)

  def _words(self, error: BaseException) -> str:
    return (
      f'a checkpoint cannot be written to {self.folder}: {first_line(error)[:300]}; once it can, the same command goes '
      'on from the one before'
    )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError."""
    try:
      yield
    except Exception as error:  # tensorstore, Orbax and the system have types of their own
      self._has_failed = True
      raise CheckpointError(self._words(error)) from error

  def _managers(self) -> list[ocp.CheckpointManager]:
    return [self._whole, self._deltas] if self._deltas else [self._whole]

  def steps(self) -> list[int]:
    """Steps of the complete whole checkpoints, oldest first."""
    return sorted(self._whole.all_steps())

  def save(self, state: TrainState, position: dict[str, Any], spec: Spec) -> None:
    """Writes in the background; an error of the save before this one is raised here."""
    step = int(state.step)
    if step in self._whole.all_steps():
      return
    tree = to_dict(state)
    with self._writing():
      if self._deltas:
        self._deltas.wait_until_finished()  # of two at once, Orbax's processes might not wait for the same
      self._whole.save(step, args=_items(tree, tree, position, spec), force=True)
    self._base = Base(step, delta.remembered(tree)) if spec.delta_seconds else None

  def save_changes(self, state: TrainState, position: dict[str, Any], spec: Spec) -> None:
    """As `save`, what changed since the last whole checkpoint; or a whole one where there is none, or where that is
    hardly more."""
    self.wait()  # a delta is of no use before the whole one
    step, tree, base = int(state.step), to_dict(state), self._base
    if any(step in manager.all_steps() for manager in self._managers()):
      return
    changed = base and delta.changes(tree, base.before)
    if not changed:
      self.save(state, position, spec)
      return
    written, rows = changed
    items = _items(tree, written, position, spec, base=ocp.args.JsonSave({'step': base.step}))
    with self._writing():
      self._deltas = self._deltas or self._manager(self.folder / DELTAS, DELTAS_KEPT)
      self._deltas.save(step, args=items, force=True)
    logging.info('step %d: a checkpoint of the %s rows that changed since step %d', step, f'{rows:,}', base.step)

  def wait(self) -> None:
    """Returns when everything saved is on the disk; raises what went wrong."""
    with self._writing():
      for manager in self._managers():
        manager.wait_until_finished()
      newest = max(self.steps(), default=0)
      for step in self._deltas.all_steps() if self._deltas else ():
        if step <= newest:
          self._deltas.delete(step)

  def restore(self, program: Program) -> Restored | None:
    """The newest checkpoint that can be read; newer ones are put aside. None if there are no checkpoints at all.

    Raises CheckpointError if one is of another model, or if none can be read: to start anew then would lose a run.
    """
    unreadable = []
    for path in self._newest_first():
      try:
        restored = _restore(path, program)
      except CheckpointError:
        raise
      except Exception as error:  # whatever a damaged file makes the reader raise
        logging.warning('checkpoint %s cannot be read: %s', path, first_line(error))
        unreadable.append(path)
        continue
      for newer in unreadable:
        self._put_aside(newer)
      self._base = restored.base
      return restored
    if unreadable:
      raise CheckpointError(
        f'no checkpoint in {self.folder} can be read (steps {[int(path.name) for path in unreadable]}); bring a copy '
        'back, or set config.checkpoint to another folder to start anew'
      )
    return None

  def _newest_first(self) -> list[Path]:
    steps = [(step, manager.directory) for manager in self._managers() for step in manager.all_steps()]
    return [Path(folder) / str(step) for step, folder in sorted(steps, key=lambda pair: -pair[0])]

  def _put_aside(self, path: Path) -> None:
    # Or the run could not save this step again.
    aside = path.parent / f'damaged-{path.name}-{time.time_ns()}'
    if jax.process_index() == 0:
      path.rename(aside)
      logging.warning('put aside as %s', aside)
    of_first(0)  # nobody goes on before it is done
    for manager in self._managers():
      manager.reload()


@dataclasses.dataclass
class _Watched:
  """A write of Orbax's that tells when it has failed."""

  future: Any
  failed: Callable[[BaseException], object]

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self.future.result(timeout)
    except Exception as error:
      self.failed(error)
      raise

  def cancel(self) -> bool | None:
    return self.future.cancel()


def _watch(handler: ocp.AsyncCheckpointHandler, failed: Callable[[BaseException], object]) -> None:
  """Has all that a handler writes in the background tell when it has failed."""
  begin = handler.async_save

  async def save(*args: Any, **kwargs: Any) -> list[_Watched]:
    return [_Watched(future, failed) for future in await begin(*args, **kwargs) or ()]

  handler.async_save = save


def _items(tree: dict[str, Any], written: dict[str, Any], position: dict[str, Any], spec: Spec, **more: Any) -> Any:
  """What a checkpoint is made of: of its arrays those that are `written`, and the digests of all."""
  config = specs.to_dict(spec)
  return ocp.args.Composite(
    state=ocp.args.PyTreeSave(written),
    position=ocp.args.JsonSave(position),
    config=ocp.args.JsonSave(config),
    digest=ocp.args.JsonSave({**digest.digest(tree), TEXTS: digest.of_texts(position, config)}),
    **more,
  )


def _restore(path: Path, program: Program) -> Restored:
  restored, digests = in_all(lambda: read(path, program))
  in_all(lambda: digest.check(to_dict(restored.state), digests))
  return dataclasses.replace(restored, state=resized(program, restored.state, restored.spec))


def in_all(function: Callable[[], Any]) -> Any:
  """What the function gives in this process, if no process failed; if one did, all raise.

  A process may miss a file of which the others read nothing. Orbax's own restore would let these wait for it for ever.
  """
  try:
    result, error = function(), None
  except CheckpointError:
    raise
  except Exception as failure:  # whatever a damaged file makes the reader raise
    result, error = None, failure
  failed = of_all(int(error is not None))
  if error:
    raise error
  if any(failed):
    raise OSError(f'process {failed.index(1)} cannot read it')
  return result


def read(path: Path, program: Program) -> tuple[Restored, digest.Digests]:
  """A checkpoint, and the digests of its arrays: empty if a version wrote it that had none. Waits for no process."""
  position, config = read_json(path, 'position'), read_json(path, 'config')
  digests = read_json(path, 'digest') if (path / 'digest').is_dir() else {}
  texts = digest.of_texts(position, config)
  if digests.get(TEXTS, texts) != texts:
    raise ValueError('its position or its config is not what was saved')
  check_same_model(config, specs.to_dict(program.spec), str(path))
  whole = path.parents[1] / str(read_json(path, 'base')['step']) if is_delta(path) else path
  if not whole.is_dir():
    raise OSError(f'it is what changed since {whole}, which is not there')
  state = _read_whole(whole, program)
  base = Base(int(whole.name), delta.remembered(to_dict(state))) if program.spec.delta_seconds else None
  if whole != path:
    state = _with_changes(path, state, program)
  return Restored(int(path.name), state, position, config, base), digests


def _read_whole(path: Path, program: Program) -> TrainState:
  template, placing = abstract_state(program), placing_of(program)
  if template.known:
    template = as_saved(template, saved_arrays(path), str(path))
  placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  abstract = jax.tree.map(placed, to_dict(template), to_dict(placing))
  return from_dict(template, _read_arrays(path, abstract), placing)


def _with_changes(path: Path, base: TrainState, program: Program) -> TrainState:
  """The state of a delta, from that of the whole checkpoint, which is given up."""
  tree, saved = to_dict(base), saved_arrays(path)
  of_rows = [name for name in tree['tables'] if delta.ROW in saved['tables'][name]]
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # each process reads all rows

  def placed(leaf: jax.Array, saved_: Any) -> jax.ShapeDtypeStruct:
    shape = tuple(saved_.shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding if shape == leaf.shape else here)

  rows = {name: saved['tables'][name].pop(delta.ROW) for name in of_rows}
  abstract = jax.tree.map(placed, tree, saved)
  for name, row in rows.items():
    abstract['tables'][name][delta.ROW] = jax.ShapeDtypeStruct(tuple(row.shape), row.dtype, sharding=here)
  changed = _read_arrays(path, abstract)
  for name in of_rows:
    changed['tables'][name] = delta.applied(tree['tables'][name], changed['tables'][name])
  return from_dict(base, changed, placing_of(program))


def _read_arrays(path: Path, abstract: Any) -> Any:
  restore = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
  return states().restore(epath.Path(path / 'state'), args=restore)


def is_delta(path: Path) -> bool:
  """Whether a checkpoint is of what changed since another."""
  return (path / 'base').is_dir()


def states() -> ocp.PyTreeCheckpointHandler:
  """What reads the item `state`."""
  return ocp.PyTreeCheckpointHandler(use_zarr3=True)


def saved_arrays(path: Path) -> Any:
  """What a checkpoint says of its arrays, which have shapes and types: the tree of `to_dict`."""
  saved = states().metadata(epath.Path(path / 'state'))
  return getattr(saved, 'tree', saved)


def read_json(path: Path, item: str) -> dict[str, Any]:
  """An item of a checkpoint other than its state."""
  return ocp.JsonCheckpointHandler().restore(epath.Path(path / item), args=ocp.args.JsonRestore())


def to_dict(state: TrainState) -> dict[str, Any]:
  """The state as nested dictionaries of arrays, without the tables' scratch, which no step reads before writing."""
  tree = serialization.to_state_dict(state)
  for table in tree['tables'].values():
    del table['scratch']
  if not state.known:
    del tree['known']  # as it was before there were embedding variables
  return tree


def placing_of(program: Program) -> TrainState:
  """Where the arrays of a state live: its shardings."""
  if program.axis.mesh:
    return state_placing(program)
  return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract_state(program))


def from_dict(template: TrainState, tree: dict[str, Any], placing: TrainState) -> TrainState:
  """The inverse of `to_dict`; `template` gives types and shapes, `placing` where the scratch will live."""
  scratch = lambda name: jax.numpy.zeros(
    template.tables[name].scratch.shape, 'int32', device=placing.tables[name].scratch
  )
  tables = {name: table | {'scratch': scratch(name)} for name, table in tree['tables'].items()}
  return serialization.from_state_dict(template, {'known': {}} | tree | {'tables': tables})


def as_saved(template: TrainState, metadata: Any, where: str) -> TrainState:
  """The template with the shapes of a checkpoint: directories may have grown since they were begun.

  Raises CheckpointError for a checkpoint of another version of this program, which kept other arrays.
  """
  tree = {name: serialization.to_state_dict(getattr(template, name)) for name in ('tables', 'known')}
  for table in tree['tables'].values():
    del table['scratch']

  def shaped(part: Any, saved: Any, path: str = '') -> Any:
    if isinstance(part, dict):
      saved = saved if isinstance(saved, dict) else {}
      return {
        name: shaped(child, saved.get(name), f'{path}.{name}') if jax.tree.leaves(child) else child
        for name, child in part.items()
      }
    if saved is None or len(saved.shape) != part.ndim:
      raise CheckpointError(
        f'{where} is of another version of this program: its state{path} is '
        f'{"missing" if saved is None else f"of shape {tuple(saved.shape)}"}, where this version has {part.shape}; go '
        'on with that version, or set config.checkpoint to another folder'
      )
    return jax.ShapeDtypeStruct(tuple(saved.shape), part.dtype)

  tree = shaped(tree, metadata)
  for table in tree['tables'].values():
    table['scratch'] = jax.ShapeDtypeStruct(table['value'].shape[:1], 'int32')
  return template.replace(
    **{name: serialization.from_state_dict(getattr(template, name), part) for name, part in tree.items()}
  )


def resized(program: Program, state: TrainState, saved: dict[str, Any]) -> TrainState:
  """The state with directories of the configured capacity, where another one was configured when it was saved.

  Otherwise they stay as large as they had grown, so that a resumed run equals an unstopped one.
  """
  now, then = specs.to_dict(program.spec)['embedding'], saved['embedding']
  changed = {'table': now['rows'] != then['rows']}
  if now['admission']['name'] == 'counter':
    changed['filter'] = now['admission']['expected_ids'] != then['admission']['expected_ids']
  parts = [part for part, is_changed in changed.items() if is_changed]
  if not state.known or not parts:
    return state
  state, lost = upkeep.moved(program, state, parts)
  if lost:
    logging.warning('%d ids of the checkpoint found no place in the directories of now', lost)
  return state


def first_line(error: BaseException) -> str:
  """An exception in one line."""
  text = str(error).strip()
  if 'No space left on device' in text:  # at the end of much else
    return 'no space is left on the device'
  return text.splitlines()[0] if text else type(error).__name__
