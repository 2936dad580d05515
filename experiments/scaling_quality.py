"""Whether the model is as good however many processes train it: `python -m experiments.scaling_quality --help`.

AUC after one epoch (or --steps), evaluated on all of eval.csv by as many processes, with the same global batches. The
learning rate decays to zero (cosine), since the noise of the last few batches, which a rounding error is enough to
change, would hide everything smaller; --constant leaves it as it is. Beside them one process with other kernels: what
another rounding of the same numbers does. Processes divide the cores of the machine; speeds mean nothing.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import common

OTHER_KERNELS = '1, XLA alone'
Results = dict[str, dict[str, float]]  # AUC by what was trained, and by the processes that did it


def train(args: argparse.Namespace, config: str, optimizer: str, seed: int, processes: str, output: Path) -> float:
  """AUC of one run; `processes` is their number, or OTHER_KERNELS."""
  flags = {'seed': seed, 'steps': args.steps, 'optimizer.name': optimizer}
  if not args.constant:
    flags |= {'optimizer.decay': 'cosine', 'optimizer.decay_steps': args.steps}
  if processes == OTHER_KERNELS:
    flags |= {'native': False}
  words = [f'--config.{name}={value}' for name, value in flags.items()]
  python, _, _, *arguments = common.dlrm_jax(config, args.data, output, args.buckets, args.batch_size, *words)
  launcher = [python, '-m', 'dlrm_jax.launch', '--processes', processes.split(',', maxsplit=1)[0], '--']
  try:
    return common.run([*launcher, *arguments])[0]['auc']
  finally:
    shutil.rmtree(output, ignore_errors=True)  # gigabytes of checkpoint


def measure(args: argparse.Namespace, run: Callable[..., float] = train) -> Results:
  """AUC of everything."""
  results = {}
  with tempfile.TemporaryDirectory() as name:
    for config in args.configs:
      for optimizer in args.optimizers:
        for seed in args.seeds:
          row = results.setdefault(f'{config}, {optimizer}, seed {seed}', {})
          for processes in (*map(str, args.processes), OTHER_KERNELS):
            row[processes] = run(args, config, optimizer, seed, processes, Path(name) / 'result')
            common.say(f'{config}, {optimizer}, seed {seed}, processes {processes}: {row[processes]:.6f}')
  return results


def render(results: Results) -> str:
  """The table: AUC of the first number of processes, and what the others differ from it."""
  first, *others = next(iter(results.values()))
  lines = [
    [name, f'{row[first]:.5f}', *(f'{1e4 * (row[other] - row[first]):+.2f}' for other in others)]
    for name, row in results.items()
  ]
  return common.table(['processes', f'{first}: AUC', *(f'{other}: difference, 1e-4' for other in others)], lines)


def main(argv: list[str]) -> None:
  """Trains everything, prints the table and writes the record."""
  parser = common.parser('scaling_quality', __doc__)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv and eval.csv (data)')
  parser.add_argument('--configs', type=common.words, default=('base', 'dynamic'), help='base,dynamic')
  parser.add_argument('--optimizers', type=common.words, default=('adamasync',), help='adamasync')
  parser.add_argument('--seeds', type=common.numbers, default=(1, 2), help='1,2')
  parser.add_argument('--processes', type=common.numbers, default=(1, 2, 4), help='1,2,4')
  parser.add_argument('--batch_size', type=int, default=512)
  parser.add_argument('--steps', type=int, default=0, help='steps of a run, one epoch at most and by default')
  parser.add_argument('--constant', action='store_true', help='the learning rate does not decay')
  args = parser.parse_args(argv)
  args.data = common.check_data(args.data, 'train.csv', 'eval.csv')
  try:
    epoch = -(-common.in_process(rows_of, args.data) // args.batch_size)
    args.steps = min(args.steps or epoch, epoch)
    results = measure(args)
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  settings = {name: getattr(args, name) for name in ('batch_size', 'buckets', 'steps', 'constant')}
  settings |= {'learning_rate': common.LEARNING_RATE, 'synthetic': common.about_data(args.data)}
  record: dict[str, Any] = {'machine': common.about_machine(None), 'settings': settings, 'auc': results}
  common.finish('scaling_quality', record, render(results), args.record)


def rows_of(data: Path) -> int:
  """Rows of train.csv."""
  from dlrm_jax import sources

  return sources.open_sources(common.make_spec('base', data, 0, 512, no_eval=True)).train.rows


if __name__ == '__main__':
  main(sys.argv[1:])
