"""One epoch and its evaluation, in a table of the form that the original has: `python -m experiments.epoch --help`.

Community TensorFlow 1.15.5 running the original's program, which is left out where it cannot be installed, then
dlrm_jax in float32 and with bfloat16 products: batches of 512 from the CSV with Adam, `cat`. Throughput is that of all
training steps. TensorFlow has 10,000 rows a column, as the original had; dlrm_jax those of configs/base.py.
"""

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import common
from experiments.benchmark_rows import SMALL, small

Run = dict[str, float]
Row = tuple[str, str, Callable[[], Run]]  # framework, dtype, what measures it


def of_tensorflow(data: Path, batch_size: int) -> Run:
  """The original's program."""
  common.install(common.TENSORFLOW_1)
  result, peak = common.run_peer(common.TENSORFLOW_1, 'quality', csv=data, buckets=SMALL, batch_size=batch_size)
  return result | {'samples_per_second': result['steps'] * batch_size / result['train_seconds'], 'peak_memory_gb': peak}


def of_dlrm_jax(config: str, data: Path, batch_size: int, rows: int) -> Run:
  """The main program."""
  with tempfile.TemporaryDirectory() as output:
    result, peak = common.run(common.dlrm_jax(config, data, Path(output), rows, batch_size, '--config.log_every=1000'))
  del result['output_dir']  # of this machine, and gone
  return result | {'peak_memory_gb': peak}


def rows_of(data: Path, batch_size: int, buckets: int) -> Iterator[Row]:
  """What is trained, one after another."""
  yield small('Community TensorFlow 1.15.5'), 'FP32', functools.partial(of_tensorflow, data, batch_size)
  for config, dtype in (('base', 'FP32'), ('bf16', 'FP32+BF16')):
    yield 'dlrm_jax', dtype, functools.partial(of_dlrm_jax, config, data, batch_size, buckets)


def measure(rows: Iterator[Row]) -> list[dict[str, Any]]:
  """All runs; one that failed says why."""
  out = []
  for framework, dtype, run in rows:
    common.say(f'{framework}, {dtype}')
    try:
      result = run()
    except common.Failed as error:
      result = {'failed': str(error)}
    out.append({**result, 'framework': framework, 'dtype': dtype})  # a peer tells a dtype, too
  return out


def render(runs: list[dict[str, Any]], best: dict[str, float] | None) -> str:
  """The table; `best` is what the true probabilities would have."""
  first = next((run for run in runs if 'failed' not in run), {})

  def line(run: dict[str, Any]) -> list[str]:
    name = [run['framework'], run['dtype']]
    if 'failed' in run:
      return [*name, run['failed'], '', '', '', '']
    rate, base = run['samples_per_second'], first['samples_per_second']
    speed = '(baseline)' if run is first else f'({rate / base:.2f}x)'
    metrics = [f'{run[metric]:.6f}' for metric in ('accuracy', 'auc', 'log_loss')]
    return [*name, *metrics, f'{rate:,.0f} {speed}', f'{run["peak_memory_gb"]:.2f} GB']

  lines = [line(run) for run in runs]
  if best:
    lines.append(['best possible', '', '', f'{best["best_auc"]:.6f}', f'{best["best_log_loss"]:.6f}', '', ''])
  return common.table(
    ['framework', 'dtype', 'accuracy', 'AUC', 'log loss', 'throughput, samples/s', 'peak memory'], lines
  )


def main(argv: list[str]) -> None:
  """Trains everything, prints the table and writes the record."""
  parser = common.parser('epoch', __doc__)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv and eval.csv (data)')
  parser.add_argument('--batch_size', type=int, default=512)
  args = parser.parse_args(argv)
  args.data = common.check_data(args.data, 'train.csv', 'eval.csv')
  load, about = common.load_before(), common.about_data(args.data)
  runs = measure(rows_of(args.data, args.batch_size, args.buckets))
  settings = {'batch_size': args.batch_size, 'buckets': args.buckets}
  record = {'machine': common.about_machine(None), 'load_before': load, 'data': about, 'settings': settings}
  common.finish('epoch', record | {'runs': runs}, render(runs, (about or {}).get('eval')), args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
