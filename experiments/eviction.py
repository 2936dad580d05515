"""What eviction does at several thresholds: `python -m experiments.eviction --help`.

One epoch of embedding variables from the CSV, then the whole evaluation: without eviction, with eviction of the ids
that were not seen for so many steps, and of those whose vectors are shorter than that, every tenth of the epoch. Beside
AUC and log loss: ids that got a row, ids that lost it (one that returns counts again), ids at the end. What steps to
live mean depends on batch size and length of the run, so they are told as a share of the epoch, too.

With --small a network of (64, 16) and (64) units, a few times as fast; what it says of thresholds is of the same kind.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import common

SMALL = ('--config.model.bottom_mlp=(64,16)', '--config.model.top_mlp=(64,)')
L2 = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 1.0)
LIVE = (0.1, 0.25, 0.5)  # of an epoch
PARTS = 10  # of an epoch, after each of which ids go


def train(args: argparse.Namespace, steps: int, name: str, value: float, output: Path) -> dict[str, Any]:
  """One run. `value` is the threshold of l2, or the steps to live."""
  flags = [f'--config.embedding.rows={args.directory_rows}', f'--config.log_every={max(1, steps // PARTS)}']
  flags += [f'--config.embedding.eviction.name={name}', f'--config.embedding.eviction.every={max(1, steps // PARTS)}']
  field = {'never': None, 'l2': 'l2', 'global_step': 'steps_to_live'}[name]
  flags += [f'--config.embedding.eviction.{field}={value}'] if field else []
  try:
    flags += [f'--config.seed={args.seed}', *(SMALL if args.small else ())]
    result, _ = common.run(common.dlrm_jax('dynamic', args.data, output, 0, args.batch_size, *flags))
    lines = (Path(result['output_dir']) / 'metrics.jsonl').read_text().splitlines()
  finally:
    shutil.rmtree(output, ignore_errors=True)
  last = [record for record in map(json.loads, lines) if record['kind'] == 'train'][-1]
  names = ('ids', 'ids_admitted', 'ids_evicted', 'lookups_unplaced')
  return {'eviction': name, 'value': value, 'step': result['step']} | {
    **{name: result[name] for name in ('auc', 'log_loss')},
    **{name: last[name] for name in names},
  }


def render(runs: list[dict[str, Any]], steps: int) -> str:
  """The table; differences are those to the first run, which evicts nobody."""
  lines = []
  for run in runs:
    share = f'{run["value"] / steps:.0%} of the epoch' if run['eviction'] == 'global_step' else ''
    name = f'{run["eviction"]} {run["value"]:g} {share}'.strip() if run['value'] else run['eviction']
    numbers = [f'{run["auc"]:.5f}', f'{run["auc"] - runs[0]["auc"]:+.5f}', f'{run["log_loss"]:.5f}']
    ids = [f'{run[part]:,}' for part in ('ids_admitted', 'ids_evicted', 'ids')]
    lines.append([name, *numbers, *ids, f'{run["ids"] / runs[0]["ids"]:.0%}'])
  header = ['AUC', 'minus never', 'log loss', 'ids that came', 'that went', 'at the end', 'of never']
  return common.table(['eviction', *header], lines)


def main(argv: list[str]) -> None:
  """Trains everything, prints the table and writes the record."""
  parser = common.parser('eviction', __doc__)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv and eval.csv (data)')
  parser.add_argument('--batch_size', type=int, default=512)
  parser.add_argument('--directory_rows', type=int, default=1 << 21, help='of the first tables (2,097,152)')
  parser.add_argument('--seed', type=int, default=2021)
  parser.add_argument('--small', action='store_true', help='a small network')
  args = parser.parse_args(argv)
  args.data = common.check_data(args.data, 'train.csv', 'eval.csv')
  with (args.data / 'train.csv').open('rb') as file:
    steps = -(-sum(1 for _ in file) // args.batch_size)
  wanted = [('never', 0), *(('l2', value) for value in L2)]
  wanted += [('global_step', max(1, round(share * steps))) for share in LIVE]
  names, runs = ('batch_size', 'directory_rows', 'seed', 'small'), []
  settings = {name: getattr(args, name) for name in names} | {'steps': steps, 'synthetic': common.about_data(args.data)}
  try:
    with tempfile.TemporaryDirectory() as folder:
      for name, value in wanted:
        runs.append(train(args, steps, name, value, Path(folder) / 'result'))
        common.say(f'{runs[-1]}')
        record = {'machine': common.about_machine(None), 'settings': settings, 'runs': runs}
        common.write_record(common.record_path('eviction', args.record), record)
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  common.finish('eviction', record, render(runs, steps), args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
