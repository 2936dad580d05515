"""One measurement of one thing, each in a process of its own: what benchmark.py and switches.py repeat.

- *from the CSV*: the training loop of the program (`train.train`) over a stretch in which the loader reads as many rows
  as are trained (see `stretch`): windows of shuffled rows that were filled before the clock would come for nothing.
- *in memory*: the step alone over batches that lie ready, the same for dlrm_jax and those peers that have it: the
  median of five stretches after a warm-up.
"""

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlrm_jax.cores import usable_cores
from experiments import common

# The loader's defaults (configs/base.py): streams times rows of a window.
WINDOWS = 16 * 20480
POOL_ROWS = 262144  # rows of the batches that lie ready
WARM_UP_STEPS = 20  # that train.py leaves out of its rate
STRETCHES = 5

Position = dict[str, int]


class Rates(NamedTuple):
  """One repetition: samples per second, None where it was not measured."""

  memory: float | None
  csv: float | None
  peak_gb: float  # of the whole process so far


class Loaded(NamedTuple):
  """One repetition of the loader alone."""

  rate: float  # rows per second
  processor_us: float  # processor time of a row, in millionths of a second
  peak_gb: float


def stretch(rows: int, batch_size: int, samples: int) -> tuple[Position, int]:
  """Where a stretch of at least `samples` samples begins, and its steps, so that as many rows are read as trained.

  The first WARM_UP_STEPS steps are not timed. Where it fits, the stretch is inside the first epoch: after the first
  window of the first stream is used up (from then on windows end and begin evenly) and before the last, longer windows
  are read. In smaller data it is whole epochs.
  """
  first, last = -(-WINDOWS // batch_size), (rows - 2 * WINDOWS) // batch_size
  steps = -(-samples // batch_size)
  if first + WARM_UP_STEPS + steps <= last:
    return {'epoch': 0, 'position': first * batch_size}, WARM_UP_STEPS + steps
  epoch = -(-rows // batch_size)
  return {'epoch': 0, 'position': 0}, WARM_UP_STEPS + epoch * -(-steps // epoch)


def train(
  config: str,
  data: Path,
  buckets: int,
  batch_sizes: Sequence[int],
  samples: int,
  fields: dict[str, Any] | None = None,
  memory: bool = True,
) -> dict[int, Rates]:
  """dlrm_jax at these batch sizes, smallest first, with one table; runs in a process of its own.

  Args:
    config: name of a file in configs/.
    data: folder with train.csv.
    buckets: rows of every column, or 0 for those of the config.
    batch_sizes: peak memory of each is that of those before it, too.
    samples: that a rate is taken over.
    fields: others of the config.
    memory: False leaves *in memory* out.
  """
  fields = {'no_eval': True, **(fields or {})}
  from dlrm_jax import main

  main.prepare_process(fields.get('intra', 0))
  from dlrm_jax import sources
  from dlrm_jax.program import make_program
  from dlrm_jax.state import init_state

  opened, state, rates = None, None, {}
  for batch_size in sorted(batch_sizes):
    program = make_program(common.make_spec(config, data, buckets, batch_size, **fields))
    opened = opened or sources.open_sources(program.spec)
    if opened.train.rows < batch_size:
      raise common.Failed(f'{opened.train.rows} rows of data are less than one batch of {batch_size}')
    state = init_state(program) if state is None else state
    in_memory = None
    if memory:
      in_memory, state = _in_memory(program, opened, state, samples)
    from_csv, state = _from_csv(program, opened, state, samples)
    rates[batch_size] = Rates(in_memory, from_csv, common.own_peak())
  return rates


def ready_batches(program: Any, opened: Any, rows: int = POOL_ROWS, stack: int = 0) -> list[Any]:
  """The first whole batches of the data, on the device; or stacks of so many of them."""
  from dlrm_jax import sources

  count = max(1, min(rows, opened.train.rows) // program.spec.batch_size // max(1, stack))
  with sources.train_batches(opened, program.spec, sources.START, stack=stack) as batches:
    return [batch for batch, _ in itertools.islice(batches, count)]


def _in_memory(program: Any, opened: Any, state: Any, samples: int) -> tuple[float, Any]:
  import jax

  from dlrm_jax.stretches import Stretch, jit_train_stretch, stack_size

  steps = stack_size(program)
  stacks, step, rates = itertools.cycle(ready_batches(program, opened, stack=steps)), jit_train_stretch(program), []
  examples = steps * program.spec.batch_size
  calls = max(1, samples // STRETCHES // examples)
  for count in (-(-WARM_UP_STEPS // steps), *[calls] * STRETCHES):
    start = time.perf_counter()
    for stack in itertools.islice(stacks, count):
      state, _ = step(state, Stretch(stack, 0, steps, None))
    jax.block_until_ready(state)
    rates.append(count * examples / (time.perf_counter() - start))
  return statistics.median(rates[1:]), state


def _from_csv(program: Any, opened: Any, state: Any, samples: int) -> tuple[float, Any]:
  from dlrm_jax import train
  from dlrm_jax.distributed import Members

  members = Members()
  position, steps = stretch(opened.train.rows, program.spec.batch_size, samples)
  job = train.Run(
    dataclasses.replace(program, spec=dataclasses.replace(program.spec, steps=steps)),
    opened,
    members,
    members.watchdog(0),  # not begun
    checkpoints=None,  # is asked for at a signal only
    records=_NoRecords(),
    predict=None,
    state=state,
    step=0,
    position=position,
  )
  train.train(job, train.StopSignals())  # which are not listened to
  return job.samples_per_second, job.state


class _NoRecords:
  """`logs.Records` that keeps nothing."""

  def write(self, kind: str, step: int, scalars: dict[str, Any]) -> None:
    """Nothing."""


def peer(which: common.Peer, arrays: Path, batch_size: int, samples: int, **flags: Any) -> Rates:
  """A peer that trains from the arrays of `common.export`; flags are those of peers/pytorch/twin.py."""
  about = {
    'data': arrays,
    'pool': POOL_ROWS,
    'repetitions': STRETCHES,
    'samples': max(batch_size, samples // STRETCHES),
  }
  result, peak = common.run_peer(which, 'speed', batch_size=batch_size, **about, **flags)
  return Rates(result['samples_per_second'], None, peak)


def csv_peer(which: common.Peer, data: Path, batch_size: int, samples: int, **flags: Any) -> Rates:
  """A peer that trains from the CSV: the median of three stretches."""
  about = {'source': 'csv', 'csv': data, 'repetitions': 3, 'samples': max(batch_size, samples // 3)}
  result, peak = common.run_peer(which, 'speed', batch_size=batch_size, **about, **flags)
  return Rates(None, result['samples_per_second'], peak)


def load(data: Path, buckets: int, cores: int, cache: bool = False) -> Loaded:
  """One epoch of the loader and nothing else, in batches of 512, on so many cores; runs in a process of its own.

  From the CSV's bytes (in the page cache) to shuffled batches; with `cache`, from what data.cache keeps, which is
  written before the clock starts and gone afterwards.
  """
  # First of all: threads have the cores of the thread that starts them.
  os.sched_setaffinity(0, usable_cores()[:cores])
  with tempfile.TemporaryDirectory() as folder:
    # The cache stands beside the file, so the file is seen from here.
    Path(folder, 'train.csv').symlink_to(data / 'train.csv')
    return _load(common.make_spec('base', Path(folder), buckets, 512, no_eval=True, inter=cores, data={'cache': cache}))


def _load(spec: Any) -> Loaded:
  from dlrm_jax import sources
  from dlrm_jax.data import pipeline

  opened = sources.open_sources(spec)  # reads all of the file, and so brings it into the page cache
  rows, size = opened.train.rows, spec.batch_size
  # From the end of an epoch to the end of the next, so that as much was read ahead before the clock as after it.
  end = {'epoch': 0, 'position': max(0, rows - size)}
  batches = pipeline.train_batches(opened.train, opened.reading, size, spec.seed, state=end)
  next(batches)
  start, processor = time.perf_counter(), time.process_time()
  for _ in range(pipeline.batches_per_epoch(rows, size)):
    next(batches)
  seconds, processor = time.perf_counter() - start, time.process_time() - processor
  batches.close()
  return Loaded(rows / seconds, processor / rows * 1e6, common.own_peak())
