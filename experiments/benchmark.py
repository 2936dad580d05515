"""How fast training and loading are, beside the peers: `python -m experiments.benchmark --help`.

One run, one process at a time, on the same data: the first repetition of every row, then the second of every row, and
so on; medians and ranges over the repetitions. `cat`, learning rate 0.002 and 19,044,490 rows of 16 by default. A row
that cannot be measured says why.

- *dlrm_jax*: Adam; base.py, bf16.py, both again at 10,000 buckets a column, and baseline.py (the seed's --tf).
- *PyTorch*: peers/pytorch, where `sparse` is one merged EmbeddingBag with sparse gradients and `pull` a faster table of
  our own making; and *FBGEMM*'s fused tables. They train from arrays in memory and never parse.
- *TensorFlow 2* in graph mode, and *TensorFlow 1.15.5* with 10,000 buckets a column: both from the CSV.

Columns: *in memory* (dlrm_jax: compute only), *from the CSV*, in samples/s, both as measurements.py says; the faster of
them as a share of what the network's matrix products alone allow in the same repetition (limits.py); peak memory of
the process, without checkpoints; AUC and log loss of the newest record of quality.py with the same settings.

A ratio is taken within a repetition, then its median. Of the peers the first repetition measures all, the others only
the fastest of each kind and batch size, so the best of the first repetition is the best of more tries.

The default grid takes about an hour on two cores that do nothing else, most of it for filling the tables of the peers;
--quick five to ten minutes. The record is written after every repetition. Without --data, --rows synthetic rows are
made in TMPDIR. The machine must be idle: PyTorch beside others can be ten times slower, since its threads wait for each
other at every operation.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import common, limits, measurements, step_parts
from experiments.benchmark_rows import CONFIGS, SMALL, Row, dlrm_jax_rows, loader_rows, peer_rows
from experiments.benchmark_tables import Measured, best, render, to_json
from experiments.measurements import Loaded

QUICK = {'batch_sizes': (512,), 'buckets': SMALL, 'repetitions': 1, 'rows': 1_000_000, 'samples': 65_536}


def install(rows: Sequence[Row], failed: dict[str, str]) -> tuple[list[Row], dict[str, str]]:
  """The rows that can be measured and the versions of their peers; `failed` gets the peers that cannot be installed."""
  versions = {}
  for peer in dict.fromkeys(row.peer for row in rows if row.peer):
    try:
      versions[peer.folder] = common.install(peer)
    except common.Failed as error:
      failed[peer.name] = str(error)
  return [row for row in rows if row.peer is None or row.peer.folder in versions], versions


def chosen(row: Row, batch_sizes: Sequence[int], rows: Sequence[Row], measured: Measured) -> list[int]:
  """Batch sizes of a row after the first repetition: all of ours; of peers, those at which it was first of a kind."""

  def rate(other: Row, size: int) -> float:
    first = measured.rates.get(other.name, {}).get(size, {}).get(0)
    return best(first) if first else 0

  def leads(size: int, kind: str) -> bool:
    return 0 < rate(row, size) == max(rate(other, size) for other in rows if kind in other.kinds)

  return [size for size in batch_sizes if row.peer is None or any(leads(size, kind) for kind in row.kinds)]


def measure_rows(rows: Sequence[Row], batch_sizes: Sequence[int], repetition: int, measured: Measured) -> None:
  """One repetition of all rows, into `measured`; what fails is not tried again."""
  again = [chosen(row, batch_sizes, rows, measured) if repetition else list(batch_sizes) for row in rows]
  for row, sizes in zip(rows, again, strict=True):
    for some in [[size] for size in sizes] if row.peer else [sizes]:
      label = f'{row.name}, batch {some[0]}' if row.peer else row.name
      if label in measured.failed:
        continue
      try:
        of_sizes = row.measure(some)
      except common.Failed as error:
        measured.failed[label] = str(error)
        common.say(f'{label}: {error}')
        continue
      for size, rates in of_sizes.items():
        measured.rates.setdefault(row.name, {}).setdefault(size, {})[repetition] = rates
        memory, csv = ('not measured' if rate is None else f'{rate:,.0f}' for rate in (rates.memory, rates.csv))
        common.say(f'{repetition + 1}: {row.name}, batch {size}: in memory {memory}, from the CSV {csv}')


def measure_loader(rows: dict[str, Callable[[], Loaded]], repetition: int, measured: Measured) -> None:
  """One repetition of the loader alone, into `measured`; what fails is not tried again."""
  for name in [name for name in rows if name not in measured.failed]:
    try:
      loaded = rows[name]()
    except common.Failed as error:
      measured.failed[name] = str(error)
      common.say(f'{name}: {error}')
      continue
    measured.loads.setdefault(name, {})[repetition] = loaded
    common.say(f'{repetition + 1}: {name}: {loaded.rate:,.0f} rows/s')


def measure_parts(args: argparse.Namespace, rows: Sequence[Row], measured: Measured) -> None:
  """Where a step's time goes, of those dtypes of dlrm_jax that are measured."""
  for dtype, config in CONFIGS.items():
    if not any(row.name == f'dlrm_jax {dtype}' for row in rows):
      continue
    arguments = (config, args.data, args.buckets, args.batch_sizes, args.interaction, args.samples // 2)
    try:
      measured.parts[dtype] = common.in_process(step_parts.measure, *arguments)
    except common.Failed as error:
      measured.failed[f'parts of a step, {dtype}'] = str(error)


def benchmark(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
  """The record, which is written after every repetition, and the tables."""
  load, measured, arrays = common.load_before(), Measured(), folder / 'arrays'
  args.data = common.find_data(args.data, args.rows, folder)
  arrays.mkdir()
  wanted = [row for row in (*dlrm_jax_rows(args), *peer_rows(args, arrays)) if re.search(args.only, row.name)]
  rows, versions = install(wanted, measured.failed)
  loaders = {name: row for name, row in loader_rows(args).items() if re.search(args.only, name)}
  if not rows and not loaders:
    raise common.Failed(
      f'--only {args.only!r}: there is no such row, or it cannot be installed {measured.failed or ""}'
    )
  spec = common.make_spec('base', args.data, args.buckets, 512, no_eval=True)
  count = common.in_process(common.export, spec, measurements.POOL_ROWS // 512, arrays)
  names = ('batch_sizes', 'buckets', 'samples', 'repetitions', 'interaction', 'only')
  settings = {name: getattr(args, name) for name in names} | {'learning_rate': common.LEARNING_RATE}
  settings |= {'train_rows': count, 'synthetic': common.about_data(args.data)}
  torch = versions.get(common.TWIN.folder)
  record = {'machine': common.about_machine(torch), 'peers': versions, 'load_before': load, 'settings': settings}
  for repetition in range(args.repetitions):
    measured.limits.append(limits.measure(args.batch_sizes, args.interaction, bool(torch)))
    measure_rows(rows, args.batch_sizes, repetition, measured)
    measure_loader(loaders, repetition, measured)
    if repetition == 0:
      measure_parts(args, rows, measured)
    record |= to_json(args, rows, measured)
    common.write_record(common.record_path('benchmark', args.record), record)
  return record, render(args, rows, measured)


def main(argv: list[str]) -> None:
  """Measures, prints the tables and writes the record."""
  parser = common.parser('benchmark', __doc__)
  common.add_data(parser, 2_000_000)
  parser.add_argument('--batch_sizes', type=common.numbers, default=(512, 2048, 8192), help='512,2048,8192')
  parser.add_argument('--interaction', choices=('cat', 'dot'), default='cat')
  parser.add_argument('--repetitions', type=int, default=3)
  parser.add_argument('--samples', type=int, default=262_144, help='that a rate is taken over (262,144)')
  parser.add_argument('--only', default='', metavar='PATTERN', help='rows whose names have this regular expression')
  text = f'{QUICK}, unless given otherwise'
  parser.add_argument('--quick', action='store_true', help=text)
  if '--quick' in argv:
    parser.set_defaults(**QUICK)
  args = parser.parse_args(argv)
  args.batch_sizes = tuple(sorted(args.batch_sizes))
  try:
    with tempfile.TemporaryDirectory() as name:
      record, tables = benchmark(args, Path(name))
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  common.finish('benchmark', record, tables, args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
