"""A run from the first batch to the last line of JSON."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import Array

from dlrm_jax import sources
from dlrm_jax import spec as specs
from dlrm_jax.checkpoint.full import Checkpoints
from dlrm_jax.clock import EverySeconds
from dlrm_jax.distributed import Members
from dlrm_jax.evaluate import evaluate
from dlrm_jax.logs import Meter, Progress, Records, Scalars, Stopwatch
from dlrm_jax.program import Program, make_program
from dlrm_jax.sharding import all_devices, of_all, of_first
from dlrm_jax.sources import Position, Sources
from dlrm_jax.spec import Spec
from dlrm_jax.state import abstract_state, init_state
from dlrm_jax.step import jit_predict
from dlrm_jax.stretches import Stretches, jit_train_stretch, stack_size
from dlrm_jax.structs import Batch, TrainState
from dlrm_jax.upkeep import PEAK, Upkeep, bytes_of, numbers_of, per_column
from dlrm_jax.watchdog import Watchdog

# Compilation and the first window of data fall into these; samples_per_second leaves them out.
WARMUP_STEPS = 20


class TrainingError(RuntimeError):
  """Training that cannot go on; the message is one line for the user."""


class Stopped(RuntimeError):
  """The run was asked to stop by a signal, and has saved a checkpoint."""

  def __init__(self, number: int) -> None:
    super().__init__(f'stopped by {signal.Signals(number).name}; resume with --config.checkpoint')
    self.number = number


@dataclasses.dataclass
class Run:
  """Where a run stands, and what it writes to."""

  program: Program
  sources: Sources
  members: Members
  watchdog: Watchdog
  checkpoints: Checkpoints
  records: Records
  predict: Callable[[TrainState, Batch], tuple[Array, Array, Array]]
  state: TrainState
  step: int
  position: Position  # of the data, after the last trained batch
  samples_per_second: float | None = None
  skipped_rows: int = 0

  def save(self, changes: bool = False) -> None:
    """Starts a checkpoint of where the run stands, or of what changed since the last whole one."""
    save = self.checkpoints.save_changes if changes else self.checkpoints.save
    save(self.state, sources.to_saved(self.sources, self.spec, self.position), self.spec)

  @property
  def spec(self) -> Spec:
    """What was asked for."""
    return self.program.spec

  @property
  def last_step(self) -> int:
    """Where the run ends, as far as is known: a work queue that several processes share may take more steps."""
    return self.spec.steps or self.step + sources.remaining_batches(self.sources, self.spec, self.position)


def run(spec: Spec, members: Members | None = None) -> None:
  """Trains, evaluates and saves as `spec` says, then prints the result as one line of JSON.

  `members` is this process among those of the run; None: there is no other.
  """
  members = members or Members()
  with members.watchdog(spec.watchdog_seconds) as watchdog, watchdog.paused():
    data = sources.open_sources(spec)  # first, since bad data is the most common mistake
    sources.check_everywhere(data)
    program = make_program(spec, all_devices())
    logging.info('%s', program.native.note)
    folder = run_folder(spec)
    write_failed = lambda line: members.is_program and members.end(line, 1)
    with Checkpoints(folder / 'checkpoints', spec.keep_checkpoint_max, write_failed) as checkpoints:
      state, step, position = restore_or_init(program, data, checkpoints)
      if is_first():
        (folder / 'config.json').write_text(json.dumps(specs.to_dict(spec), indent=2) + '\n')
      with Records(folder if is_first() else None, step) as records:
        predict = jit_predict(program)
        job = Run(program, data, members, watchdog, checkpoints, records, predict, state, step, position)
        del state  # the job owns it now: a second reference would keep the first tables alive
        evaluation = train_and_evaluate(job)
    if is_first():
      print_result(job, evaluation, folder)


def train_and_evaluate(run: Run) -> Scalars:
  """What is left of a run, and the metrics at its end, if they are asked for."""
  spec = run.spec
  if spec.embedding.kind in specs.KEYED and run.last_step >= specs.MOST_STEPS:
    raise TrainingError(
      f'the run would end at step {run.last_step}, and directories of ids count less than {specs.MOST_STEPS}; set '
      'config.steps or config.epochs lower'
    )
  if run.step >= run.last_step:
    logging.info('already at step %d, the run was to end at step %d: nothing to train', run.step, run.last_step)
  else:
    with StopSignals() as signals:
      if evaluates_after(spec, run.step) and not of_first(run.records.is_evaluated):
        evaluation_of(run)  # the run was killed between the checkpoint and this
      train(run, signals)
      run.save()
      run.checkpoints.wait()  # before the evaluation, which may take long and be cut off
    if stop := max(of_all(signals.received)):
      raise Stopped(stop)
  return {} if spec.no_eval else evaluation_of(run)


def is_first() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def train(run: Run, signals: 'StopSignals') -> None:
  """The training loop. Stopped, after a checkpoint, if a signal asked for it."""
  spec, watchdog, step_fn, upkeep = run.spec, run.watchdog, jit_train_stretch(run.program), Upkeep(run.program)
  watch, meter, metrics, stop = Stopwatch(WARMUP_STEPS), Meter(), None, 0
  deltas = EverySeconds(spec.delta_seconds, run.step)
  with (
    sources.train_batches(
      run.sources, spec, run.position, run.program.axis, run.members, stack_size(run.program)
    ) as batches,
    Progress(run.step, run.last_step, spec.batch_size, is_first()) as progress,
    watchdog.resumed(),
  ):
    stretches = Stretches(batches)
    while run.step < run.last_step and not stop:
      stretch = stretches.take(1 if watch.is_warming else until_due(run, upkeep.periods))
      with watchdog.paused() if watch.is_warming else contextlib.nullcontext(), timeline(run):
        before, (run.state, metrics) = metrics, step_fn(run.state, stretch)
      run.step, (run.position, run.skipped_rows) = run.step + stretch.steps, stretch.place
      with watchdog.paused():
        run.state = upkeep(run.state, run.step)
      jax.block_until_ready(before)  # the device has one more stretch to do; more would only be slow to stop
      progress.advance(stretch.steps)
      meter.add(metrics)
      watch.count(stretch.steps * spec.batch_size, metrics)
      watchdog.step_done(run.step)

      last = run.step == run.last_step
      save = every(spec.save_steps, run.step) and not last
      delta = not (save or last) and deltas.is_due(run.step)
      # In this order: nothing is saved whose loss was not seen to be finite, and it is safe before the slow evaluation.
      if save or delta or last or every(spec.log_every, run.step):
        log(run, meter, progress)
      with watchdog.paused():
        if save or delta:
          run.save(changes=delta)
          deltas.restart(run.step)
        if evaluates_after(spec, run.step) and not last:
          watch.pause(run.state)
          evaluation_of(run)
          watch.go()
          meter.restart()
      stop = run.members.stop(run.step, signals.received)
      if stop and meter.has_steps:
        log(run, meter, progress)
    watch.pause(run.state)
  run.samples_per_second = watch.rate()
  run.skipped_rows = sum(of_all(run.skipped_rows))
  warn_of_skipped(run.skipped_rows, 'training')
  if stop:
    run.save(changes=spec.delta_seconds > 0)
    run.checkpoints.wait()
    raise Stopped(stop)


def until_due(run: Run, periods: Sequence[int]) -> int:
  """Steps up to the next one after which something is to happen, `periods` of steps included."""
  spec = run.spec
  all_periods = (spec.save_steps, spec.eval_every, spec.log_every, *periods)
  left = [run.last_step - run.step, *(period - run.step % period for period in all_periods if period)]
  if spec.timeline:  # a profile is of one step
    left.append(max(1, spec.timeline - run.step % spec.timeline - 1))
  return min(left)


def every(steps: int, step: int) -> bool:
  """Whether something that happens every so many steps (0: never) happens after this one."""
  return steps > 0 and step % steps == 0


def evaluates_after(spec: Spec, step: int) -> bool:
  """Whether an evaluation is due after this step, before the end."""
  return step > 0 and every(spec.eval_every, step) and not spec.no_eval


def log(run: Run, meter: Meter, progress: Progress) -> None:
  """A line of log and a record. TrainingError if the loss is no longer a number."""
  scalars = meter.read() | numbers_of(run.state.known)
  loss = scalars['loss']
  if loss is not None and not math.isfinite(loss):
    raise TrainingError(
      f'the loss is {loss} at step {run.step}: training has diverged. Try a lower config.optimizer.learning_rate than '
      f'{run.spec.optimizer.learning_rate} or config.optimizer.warmup_steps; earlier checkpoints are good'
    )
  run.records.write('train', run.step, scalars)
  if loss is not None:
    progress.show(loss)
  if not progress.visible:
    left = (run.last_step - run.step) * run.spec.batch_size / max(scalars['samples_per_second'], 1)
    logging.info(
      'step %d of %d: loss %s, %.0f samples/s, %.0f s left', run.step, run.last_step,
      'none' if loss is None else f'{loss:.5f}', scalars['samples_per_second'], left,
    )  # fmt: skip


def evaluation_of(run: Run) -> Scalars:
  """Metrics over the whole evaluation set, recorded."""
  started = time.perf_counter()
  with sources.eval_batches(run.sources, run.spec, run.program.axis) as batches:
    result = evaluate(run.predict, run.state, (batch for batch, _ in batches))
  warn_of_skipped(sum(of_all(batches.items.skipped_rows)), 'evaluation')
  run.records.write('eval', run.step, result | per_column(run.program, run.state))
  seconds = time.perf_counter() - started
  shown = ', '.join(f'{name} {value:.6g}' for name, value in result.items() if value is not None)
  logging.info('evaluation at step %d: %s (%.1f s)', run.step, shown, seconds)
  warn_if_useless(result)
  return result


def warn_of_skipped(rows: int, what: str) -> None:
  """Says how many bad rows were left out."""
  if rows and is_first():
    logging.warning('%d bad rows of the %s data were left out (data.on_bad_row=skip)', rows, what)


def warn_if_useless(result: Scalars) -> None:
  """Says so when a model has learned nothing, which no other figure shows as plainly."""
  auc = result['auc']
  if not is_first():
    return
  if auc is None:
    logging.warning('no AUC: the evaluation data has rows of one class only, or the model returns no finite numbers')
  elif auc < 0.55:
    logging.warning(
      'AUC %.3f is close to chance: look at the order of the columns, the learning rate and the labels of the data', auc
    )


def restore_or_init(program: Program, data: Sources, checkpoints: Checkpoints) -> tuple[TrainState, int, Position]:
  """State, step and data position to start from."""
  abstract = abstract_state(program)
  rows = sum(table.value.shape[0] for table in abstract.tables.values())
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  logging.info('%d table(s), %s rows; with all optimizer memory %.2f GB', len(abstract.tables), f'{rows:,}', size / 1e9)
  memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') * jax.process_count()
  if jax.default_backend() == 'cpu' and size > memory:
    raise TrainingError(
      f'tables, network and optimizer need {size / 1e9:.1f} GB, the machines have {memory / 1e9:.1f} GB; lower '
      'config.embedding.buckets, config.embedding.rows, config.embedding.dim or the sizes of config.model'
    )
  limit = program.spec.embedding.memory_gb * 1e9
  own = PEAK * bytes_of((abstract.tables, abstract.known))
  if limit and own > limit:
    raise TrainingError(
      f'config.embedding.memory_gb={program.spec.embedding.memory_gb}: the first tables need {own / 1e9:.3f} GB, with '
      'the copy that a save holds; raise it, or lower config.embedding.rows'
    )
  restored = checkpoints.restore(program)
  if restored is None:
    return init_state(program), 0, sources.START
  position = sources.from_saved(data, program.spec, restored.position)
  logging.info('resumed from step %d of %s', restored.step, checkpoints.folder)
  return restored.state, restored.step, position


def run_folder(spec: Spec) -> Path:
  """The folder that a run writes to, made if need be; the same one in all processes."""
  if spec.checkpoint:
    folder = Path(spec.checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
  name = lambda stamp: Path(spec.output_dir) / f'model_DLRM_{stamp}'
  stamp = int(time.time())
  while is_first():
    try:
      name(stamp).mkdir(parents=True)
      break
    except FileExistsError:  # another run started in the same second
      stamp += 1
  return name(of_first(stamp))


@contextlib.contextmanager
def timeline(run: Run) -> Iterator[None]:
  """A profile of the step about to be done, where one is due."""
  if not every(run.spec.timeline, run.step + 1) or not is_first():
    yield
    return
  folder = run.checkpoints.folder.parent / 'timeline'
  jax.block_until_ready(run.state)  # or the steps before it would be in the picture
  with jax.profiler.trace(str(folder)):
    yield
    jax.block_until_ready(run.state)
  logging.info('profile of step %d in %s', run.step + 1, folder)


class StopSignals:
  """SIGTERM and SIGINT end a run after its step, with a checkpoint; a second one ends it at once. A context manager."""

  def __init__(self) -> None:
    self.received = 0
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'StopSignals':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def _receive(self, number: int, _: object) -> None:
    self.received = number
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)


def print_result(run: Run, evaluation: Scalars, folder: Path) -> None:
  """The one line of stdout."""
  result = {
    'step': run.step,
    'samples_per_second': run.samples_per_second and round(run.samples_per_second, 1),
    **{name: value for name, value in evaluation.items() if name != 'examples'},
    'skipped_rows': run.skipped_rows,
    'peak_memory_gb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    'output_dir': str(folder),
  }
  print(json.dumps(result), flush=True)
