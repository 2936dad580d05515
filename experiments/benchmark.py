"""How fast training and loading are, beside the PyTorch twin: `python -m experiments.benchmark --help`.

One run, one table, one process at a time: the first repetition of every row, then the second of every row, and so on;
medians and ranges over the repetitions. Adam, `cat`, 19,044,490 rows of 16 (--buckets full) for all rows.

- *from the CSV*: `python -m dlrm_jax.main`, over a stretch in which the loader reads as many rows as are trained
  (see `stretch`): the windows of shuffled rows that were filled before it began would otherwise come for nothing.
- *compute only* and *in memory*: the step over batches of the same data that lie ready, the same for dlrm_jax and the
  twin: the median of five stretches after a warm-up. The PyTorch twin never parses.
- *loader alone*: one epoch from the CSV's bytes (in the page cache) to shuffled batches, on one core and on two.

A ratio is one repetition's rate over the best PyTorch f32 rate of the same repetition. Peak memory is that of the whole
process, and for *from the CSV* includes the checkpoint at the end, which takes 3.7 GB of TMPDIR for a while.
Without --data, --rows synthetic rows are made in TMPDIR. The machine must be idle: PyTorch beside others can be ten
times slower, since its threads wait for each other at every operation.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import common

# The loader's defaults (configs/base.py): streams times rows of a window.
WINDOWS = 16 * 20480
POOL_ROWS = 262144  # rows of the batches that lie ready
WARM_UP_STEPS = 20
STRETCHES = 5  # compute only and in memory: a repetition is the median of so many
F32_PEERS = ('PyTorch f32, table pull, in memory', 'PyTorch f32, table sparse, in memory')


class Measured(NamedTuple):
  """One repetition of a row."""

  rate: float  # samples (of the loader: rows) per second
  peak_gb: float


Row = Callable[[], Measured]


def stretch(rows: int, batch_size: int, steps: int) -> tuple[int, int]:
  """First and last step of a stretch of at least `steps` steps in which the loader reads as many rows as are trained.

  Where it fits, that is inside the first epoch: after the first window of the first stream is used up (from then on
  windows end and begin evenly) and before the last, longer windows are read. In smaller data it is whole epochs.
  """
  first, last = -(-WINDOWS // batch_size), (rows - 2 * WINDOWS) // batch_size
  if first + steps <= last:
    return first, first + steps
  epoch = -(-rows // batch_size)
  return epoch, epoch * (1 + -(-steps // epoch))


def steady_rate(lines: list[str], first: int, last: int, batch_size: int) -> float:
  """Samples per second between two steps, from the lines of metrics.jsonl."""
  records = [json.loads(line) for line in lines]
  times = {record['step']: record['time'] for record in records if record['kind'] == 'train'}
  return (last - first) * batch_size / (times[last] - times[first])


def from_csv(args: argparse.Namespace, config: str, rows: int, output: Path) -> Measured:
  """Training by the main program."""
  first, last = stretch(rows, args.batch_size, args.steps)
  flags = ('--config.no_eval', f'--config.steps={last}', f'--config.log_every={first}')
  try:
    result, peak = common.run(common.dlrm_jax(config, args.data, output, args.buckets, args.batch_size, *flags))
    lines = (Path(result['output_dir']) / 'metrics.jsonl').read_text().splitlines()
  finally:
    shutil.rmtree(output, ignore_errors=True)  # gigabytes of checkpoint
  return Measured(steady_rate(lines, first, last, args.batch_size), peak)


def compute_only(args: argparse.Namespace, config: str, arrays: Path) -> Measured:
  """The compiled step over batches that lie on the device; runs in a process of its own."""
  import jax
  import numpy as np

  from dlrm_jax.program import make_program
  from dlrm_jax.state import init_state
  from dlrm_jax.step import jit_train_step
  from dlrm_jax.structs import Batch

  program = make_program(common.make_spec(config, args.data, args.buckets, args.batch_size))
  columns = {name: np.load(arrays / f'train_{name}.npy') for name in ('label', 'dense', 'bucket')}
  columns['weight'] = np.ones_like(columns['label'])
  starts = range(0, len(columns['label']) - args.batch_size + 1, args.batch_size)  # whole batches, as the twin
  parts = ({name: array[at : at + args.batch_size] for name, array in columns.items()} for at in starts)
  batches = itertools.cycle([jax.device_put(Batch(**part)) for part in parts])
  state, step, rates = init_state(program), jit_train_step(program), []
  for steps in (WARM_UP_STEPS, *[args.stretch] * STRETCHES):
    start = time.perf_counter()
    for batch in itertools.islice(batches, steps):
      state, _ = step(state, batch)
    jax.block_until_ready(state)
    rates.append(steps * args.batch_size / (time.perf_counter() - start))
  return Measured(statistics.median(rates[1:]), common.own_peak())


def twin(args: argparse.Namespace, python: Path, arrays: Path, dtype: str, table: str) -> Measured:
  """The PyTorch twin over the same batches."""
  flags = {'data': arrays, 'dtype': dtype, 'table': table, 'buckets': args.buckets, 'batch_size': args.batch_size}
  flags |= {'pool': POOL_ROWS, 'repetitions': STRETCHES, 'samples': args.stretch * args.batch_size}
  result, peak = common.run_twin(python, 'speed', **flags)
  return Measured(result['samples_per_second'], peak)


def loader(args: argparse.Namespace, cores: int) -> Measured:
  """One epoch of the loader, and nothing else, on so many cores; runs in a process of its own."""
  # First of all: threads have the cores of the thread that starts them.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
  from dlrm_jax import sources
  from dlrm_jax.data import pipeline

  spec = common.make_spec('base', args.data, args.buckets, args.batch_size, no_eval=True, inter=cores)
  opened = sources.open_sources(spec)  # counts the lines, and so brings the file into the page cache
  rows = opened.train.rows
  # From the end of an epoch to the end of the next, so that as much was read ahead before the clock as after it.
  end = {'epoch': 0, 'position': max(0, rows - args.batch_size)}
  batches = pipeline.train_batches(opened.train, opened.reading, args.batch_size, spec.seed, state=end)
  next(batches)
  start = time.perf_counter()
  for _ in range(pipeline.batches_per_epoch(rows, args.batch_size)):
    next(batches)
  seconds = time.perf_counter() - start
  batches.close()
  return Measured(rows / seconds, common.own_peak())


def all_rows(args: argparse.Namespace, python: Path | None, rows: int, folder: Path) -> dict[str, Row]:
  """What each row of the table measures; without the twin's when there is none."""
  alone = lambda *call: functools.partial(common.in_process, *call)
  table, arrays = {}, folder / 'arrays'
  for name, config in (('f32', 'base'), ('bf16', 'bf16')):
    table[f'dlrm_jax {name}, from the CSV'] = functools.partial(from_csv, args, config, rows, folder / 'result')
    table[f'dlrm_jax {name}, compute only'] = alone(compute_only, args, config, arrays)
  if python:
    table[F32_PEERS[0]] = functools.partial(twin, args, python, arrays, 'f32', 'pull')
    table[F32_PEERS[1]] = functools.partial(twin, args, python, arrays, 'f32', 'sparse')
    table['PyTorch bf16, table pull, in memory'] = functools.partial(twin, args, python, arrays, 'bf16', 'pull')
  for cores in range(1, min(common.CORES, 2) + 1):
    table[f'loader alone, {cores} core{"s" * (cores > 1)} (rows/s)'] = alone(loader, args, cores)
  return table


def measure(rows: dict[str, Row], repetitions: int) -> tuple[dict[str, list[Measured]], dict[str, str]]:
  """All rows in turn, so many times; and why those of the twin that failed did."""
  results, failed = {name: [] for name in rows}, {}
  for repetition in range(repetitions):
    for name in list(results):
      try:
        results[name].append(rows[name]())
      except common.Failed as error:
        if not name.startswith('PyTorch'):
          raise common.Failed(f'{name}: {error}') from error
        failed[name] = str(error)
        del results[name]
        continue
      common.say(f'{repetition + 1} of {repetitions}: {name}: {results[name][-1].rate:,.0f}')
  return results, failed


def summary(results: dict[str, list[Measured]]) -> dict[str, dict[str, Any]]:
  """Of each row: rates, ratios to the best PyTorch f32 rate of the same repetition, their medians, peak memory."""
  peers = [results[name] for name in F32_PEERS if name in results]
  best = [max(row.rate for row in repetition) for repetition in zip(*peers, strict=True)]
  out = {}
  for name, measured in results.items():
    rates = [one.rate for one in measured]
    ratios = [] if name.startswith('loader') else [rate / peer for rate, peer in zip(rates, best, strict=False)]
    out[name] = {
      'rate': round(statistics.median(rates), 1),
      'rates': [round(rate, 1) for rate in rates],
      'ratio': round(statistics.median(ratios), 3) if ratios else None,
      'ratios': [round(ratio, 3) for ratio in ratios],
      'peak_memory_gb': round(max(one.peak_gb for one in measured), 2),
    }
  return out


def render(rows: dict[str, dict[str, Any]], failed: dict[str, str]) -> str:
  """The table; `failed` says of rows why they could not be measured."""
  lines = []
  for name, row in rows.items():
    rates, ratios = row['rates'], row['ratios']
    ratio = [f'{row["ratio"]:.2f}x', f'{min(ratios):.2f}-{max(ratios):.2f}'] if ratios else ['', '']
    spread = f'{min(rates):,.0f}-{max(rates):,.0f}'
    lines.append([name, f'{row["rate"]:,.0f}', spread, *ratio, f'{row["peak_memory_gb"]:.2f}'])
  lines += [[f'{name}: {reason}', '', '', '', '', ''] for name, reason in failed.items()]
  return common.table(('', 'samples/s', 'range', 'of best PyTorch f32', 'range', 'peak memory, GB'), lines)


def find_data(args: argparse.Namespace, folder: Path) -> Path:
  """--data, or synthetic data made in a temporary folder."""
  if args.data:
    return common.check_data(args.data, 'train.csv')
  common.say(f'making {args.rows:,} rows of data')
  flags = ('--rows', str(args.rows), '--eval_rows', '1', '--out', folder / 'data')
  common.run([sys.executable, '-m', 'dlrm_jax.data.synthetic', *flags])
  return folder / 'data'


def benchmark(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
  """The record and the table."""
  args.data, args.stretch = find_data(args, folder), max(1, args.steps // STRETCHES)
  (folder / 'arrays').mkdir()
  python, torch, failed, load = None, None, {}, common.load_before()
  try:
    python, torch = common.install_twin()
  except common.Failed as error:
    failed['PyTorch'] = str(error)
  spec = common.make_spec('base', args.data, args.buckets, args.batch_size, no_eval=True)
  rows = common.in_process(common.export, spec, POOL_ROWS // args.batch_size, folder / 'arrays')
  if rows < args.batch_size:
    raise common.Failed(f'{rows} rows of data are less than one batch of {args.batch_size}')
  measured, failed_later = measure(all_rows(args, python, rows, folder), args.repetitions)
  results, failed = summary(measured), failed | failed_later
  options = {name: getattr(args, name) for name in ('batch_size', 'buckets', 'steps', 'repetitions')}
  options |= {'optimizer': 'adam', 'interaction': 'cat', 'train_rows': rows, 'synthetic': common.about_data(args.data)}
  record = {'machine': common.about_machine(torch), 'load_before': load, 'settings': options}
  return record | {'rows': results, 'failed': failed}, render(results, failed)


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the record."""
  parser = common.parser('benchmark', __doc__)
  parser.add_argument('--data', type=Path, help='folder with train.csv')
  parser.add_argument('--rows', type=int, default=2_000_000, help='rows to make without --data (2,000,000)')
  parser.add_argument('--repetitions', type=int, default=3)
  parser.add_argument('--steps', type=int, default=1000, help='that a repetition of training is timed over (1000)')
  args = parser.parse_args(argv)
  try:
    with tempfile.TemporaryDirectory() as name:
      record, table = benchmark(args, Path(name))
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  common.finish('benchmark', record, table, args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
