"""How well dlrm_jax learns, beside the PyTorch twin: `python -m experiments.quality --help`.

AUC and log loss after one epoch (or --steps), evaluated on all of eval.csv, for each seed and in the mean, with the
same hyperparameters: Adam, learning rate .002, the same buckets and batches. The twin gets dlrm_jax's own batches in
the order of the first seed, as arrays in TMPDIR (160 bytes a row), and its seed varies its initial values only;
dlrm_jax's seed varies the order of the data as well. In the mean that favours neither.

Samples/s are those that each program reports: dlrm_jax parses CSVs (but its first windows of rows lie ready when its
clock starts: 330,000 of all), the twin reads arrays; experiments/benchmark.py compares speeds. Peak memory is
that of the whole process: for dlrm_jax with the checkpoint, for the twin with pages of the arrays that it has mapped.
"""

import argparse
import functools
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import common

SYSTEMS = {'dlrm_jax f32': 'base', 'dlrm_jax bf16': 'bf16', 'dlrm_jax bf16, tables too': 'bf16_tables'}
TWIN = 'PyTorch f32'
METRICS = ('auc', 'log_loss')
Result = dict[str, float]


def train_dlrm_jax(args: argparse.Namespace, config: str, seed: int, steps: int, output: Path) -> Result:
  """One run of the main program."""
  flags = (f'--config.seed={seed}', f'--config.steps={steps}')
  try:
    result, peak = common.run(common.dlrm_jax(config, args.data, output, args.buckets, args.batch_size, *flags))
  finally:
    shutil.rmtree(output, ignore_errors=True)  # gigabytes of checkpoint
  return pick(result, peak)


def train_twin(args: argparse.Namespace, seed: int, arrays: Path) -> Result:
  """One run of the PyTorch twin."""
  flags = {'data': arrays, 'buckets': args.buckets, 'batch_size': args.batch_size, 'seed': seed}
  return pick(*common.run_peer(common.TWIN, 'quality', **flags))


def pick(result: dict[str, Any], peak_gb: float) -> Result:
  """The figures of a run."""
  names = (*METRICS, 'samples_per_second')
  return {name: result[name] for name in names} | {'peak_memory_gb': round(peak_gb, 2)}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
  """Mean and its standard error; None for one value."""
  error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
  return statistics.fmean(values), error


def render(results: dict[str, list[Result]], seeds: list[int], best: dict[str, float] | None) -> str:
  """A table for each metric, with the difference of the means to the twin; `best`: that of the true probabilities."""
  header = [*(f'seed {seed}' for seed in seeds), 'mean', 'standard error', 'minus PyTorch', 'samples/s', 'peak, GB']
  parts = []
  for metric in METRICS:
    lines, twin = [], [result[metric] for result in results.get(TWIN, [])]
    for name, runs in results.items():
      values = [run[metric] for run in runs]
      mean, error = mean_and_error(values)
      difference = f'{mean - statistics.fmean(twin):+.5f}' if twin and name != TWIN else ''
      words = [*values, mean, error]
      rates = [run['samples_per_second'] for run in runs if run['samples_per_second']]  # 20 steps or less have none
      speed = f'{statistics.median(rates):,.0f}' if rates else ''
      peak = max(run['peak_memory_gb'] for run in runs)
      numbers = ['' if word is None else f'{word:.5f}' for word in words]
      lines.append([name, *numbers, difference, speed, f'{peak:.2f}'])
    if best and best[f'best_{metric}'] is not None:
      blank = [''] * len(seeds)
      lines.append(['best possible', *blank, f'{best[f"best_{metric}"]:.5f}', '', '', '', ''])
    parts.append(common.table([metric.replace('_', ' '), *header], lines))
  return '\n\n'.join(parts)


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
  """The record and the tables."""
  arrays, output, torch, failed = folder / 'arrays', folder / 'result', None, {}
  arrays.mkdir()
  spec = common.make_spec('base', args.data, args.buckets, args.batch_size, seed=args.seeds[0])
  rows = common.in_process(common.export, spec, args.steps or sys.maxsize, arrays)
  epoch = -(-rows // args.batch_size)
  steps = min(args.steps or epoch, epoch)
  ours = functools.partial(train_dlrm_jax, args, steps=steps, output=output)
  runs = {name: functools.partial(ours, config) for name, config in SYSTEMS.items()}
  try:
    torch = common.install(common.TWIN)
    runs[TWIN] = lambda seed: train_twin(args, seed, arrays)
  except common.Failed as error:
    failed[TWIN] = str(error)
  results = {name: [] for name in runs}
  for seed in args.seeds:
    for name, run in runs.items():
      results[name].append(run(seed))
      common.say(f'seed {seed}: {name}: {results[name][-1]}')
  data = common.about_data(args.data)
  table = render(results, args.seeds, data and data['eval'])
  table += ''.join(f'\n\n{name}: {reason}' for name, reason in failed.items())
  settings = {'batch_size': args.batch_size, 'buckets': args.buckets, 'seeds': args.seeds, 'steps': steps}
  settings |= {'optimizer': 'adam', 'learning_rate': common.LEARNING_RATE, 'interaction': 'cat'}
  settings |= {'train_rows': rows, 'synthetic': data}
  return {'machine': common.about_machine(torch), 'settings': settings, 'runs': results, 'failed': failed}, table


def main(argv: list[str]) -> None:
  """Trains everything, prints the tables and writes the record."""
  parser = common.parser('quality', __doc__)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv and eval.csv (data)')
  parser.add_argument('--batch_size', type=int, default=512)
  parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
  parser.add_argument('--steps', type=int, default=0, help='steps of a run, one epoch at most and by default')
  args = parser.parse_args(argv)
  args.data = common.check_data(args.data, 'train.csv', 'eval.csv')
  try:
    with tempfile.TemporaryDirectory() as name:
      record, table = measure(args, Path(name))
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  common.finish('quality', record, table, args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
