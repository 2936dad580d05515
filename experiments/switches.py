"""What each switch is worth: `python -m experiments.switches --help`.

Training from the CSV (see measurements.py) with one switch changed, beside the same repetition's run with the defaults:
samples/s, their ratio (median and range over the repetitions) and peak memory. The allocators are preloaded, jemalloc
with the MALLOC_CONF of DeepRec's own script. One process at a time, each of which fills its own table: half a minute
for each of fourteen rows and three repetitions. The machine must be idle.
"""

import argparse
import ctypes.util
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlrm_jax import memory
from experiments import common, measurements
from experiments.benchmark_rows import CONFIGS
from experiments.benchmark_tables import spread
from experiments.measurements import Rates

DEFAULTS = 'defaults'


@dataclasses.dataclass(frozen=True)
class Switch:
  """What differs from the defaults: fields of the config, or a library that is preloaded."""

  name: str
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  library: str = ''
  environment: dict[str, str] = dataclasses.field(default_factory=dict)


def switches(batch_size: int) -> list[Switch]:
  """The defaults, and then one change each."""
  jemalloc, with_huge_pages = ({memory.CONF: conf} for conf in (memory.KEPT, f'{memory.KEPT},thp:always'))
  return [
    Switch(DEFAULTS),
    Switch('native off', {'native': False}),
    Switch('huge pages off', environment={memory.TUNABLES: f'{memory.HUGE_PAGES}=0'}),
    Switch('embedding.dtype bfloat16', {'embedding': {'dtype': 'bfloat16'}}),
    Switch('data.cache on', {'data': {'cache': True}}),
    Switch('op_fusion off', {'op_fusion': False}),
    Switch('emb_fusion off', {'embedding': {'fusion': False}}),
    Switch('smartstaged off', {'smartstaged': False}),
    *(Switch(f'micro_batch {slices}', {'micro_batch': slices}) for slices in (2, 8) if not batch_size % slices),
    Switch('inter 2', {'inter': 2}),
    Switch('intra 1', {'intra': 1}),
    Switch('jemalloc preloaded', library='jemalloc', environment=jemalloc),
    Switch('jemalloc preloaded, thp:always', library='jemalloc', environment=with_huge_pages),
    Switch('tcmalloc preloaded', library='tcmalloc'),
  ]


def find_library(name: str, path: Path | None) -> str:
  """What to preload: the path, or the library of this name that the system's linker finds. Failed if there is none."""
  if path and not path.is_file():
    raise common.Failed(f'no file {path.name}; give --{name} the path of the library')
  found = path or next(filter(None, map(ctypes.util.find_library, (name, f'{name}_minimal'))), None)
  if not found:
    raise common.Failed(f'no lib{name} on this machine; install it, or give --{name} its path')
  return str(found)


def train(library: str, *arguments: Any) -> dict[int, Rates]:
  """`measurements.train`. Failed if the library that this process was to have was not loaded."""
  name = os.path.basename(library)
  # A path may lead to a file of another name, so what counts is that of the file it leads to, too.
  names = {name, os.path.basename(os.path.realpath(library))}
  maps = Path('/proc/self/maps').read_text()
  if name and not any(one in maps for one in names):
    raise common.Failed(f'{name} was not loaded')
  return measurements.train(*arguments, memory=False)


def measure(args: argparse.Namespace, switch: Switch) -> Rates:
  """One repetition of one switch."""
  environment, library = dict(switch.environment), ''
  if switch.library:
    library = find_library(switch.library, getattr(args, switch.library))
    environment['LD_PRELOAD'] = library
  arguments = (CONFIGS[args.dtype], args.data, args.buckets, (args.batch_size,), args.samples, switch.fields)
  return common.in_process(train, library, *arguments, environment=environment)[args.batch_size]


def measure_all(args: argparse.Namespace) -> tuple[dict[str, dict[int, Rates]], dict[str, str]]:
  """Rates by switch and repetition, and why those that failed did. Failed if the defaults did."""
  results, failed = {}, {}
  for repetition in range(args.repetitions):
    for switch in switches(args.batch_size):
      if switch.name in failed:
        continue
      try:
        rates = measure(args, switch)
      except common.Failed as error:
        if switch.name == DEFAULTS:
          raise
        failed[switch.name] = str(error)
        continue
      results.setdefault(switch.name, {})[repetition] = rates
      common.say(f'{repetition + 1} of {args.repetitions}: {switch.name}: {rates.csv:,.0f}')
  return results, failed


def summary(results: dict[str, dict[int, Rates]]) -> dict[str, dict[str, Any]]:
  """Of each switch: rates, ratios to the defaults of the same repetition, and peak memory."""
  return {
    name: {
      'rates': [rates.csv for rates in of.values()],
      'ratios': [round(rates.csv / results[DEFAULTS][repetition].csv, 3) for repetition, rates in of.items()],
      'peak_gb': round(statistics.median(rates.peak_gb for rates in of.values()), 2),
    }
    for name, of in results.items()
  }


def render(rows: dict[str, dict[str, Any]], failed: dict[str, str], title: str) -> str:
  """The table."""
  lines = []
  for name, row in rows.items():
    ratio, ratios = spread(row['ratios'], '.2f') if name != DEFAULTS else ('', '')
    lines.append([name, *spread(row['rates']), ratio, ratios, f'{row["peak_gb"]:.2f}'])
  lines += [[f'{name}: {reason}', '', '', '', '', ''] for name, reason in failed.items()]
  return common.table([title, 'samples/s', 'range', 'of defaults', 'range', 'peak, GB'], lines)


def main(argv: Sequence[str]) -> None:
  """Measures, prints the table and writes the record."""
  parser = common.parser('switches', __doc__)
  common.add_data(parser, 2_000_000)
  parser.add_argument('--dtype', choices=tuple(CONFIGS), default='bf16')
  parser.add_argument('--batch_size', type=int, default=512)
  parser.add_argument('--repetitions', type=int, default=3)
  # Most of the first epoch of two million rows (see measurements.stretch): a second and a half of a fast machine, as
  # 262,144 samples take, put the defaults a quarter too low.
  parser.add_argument('--samples', type=int, default=917_504, help='that a rate is taken over (917,504)')
  for name in ('jemalloc', 'tcmalloc'):
    parser.add_argument(f'--{name}', type=Path, metavar='PATH', help='the library, where the linker does not find it')
  args = parser.parse_args(argv)
  load = common.load_before()
  try:
    with tempfile.TemporaryDirectory() as name:
      args.data = common.find_data(args.data, args.rows, Path(name))
      about = common.about_data(args.data)
      results, failed = measure_all(args)
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  rows = summary(results)
  options = {name: getattr(args, name) for name in ('dtype', 'batch_size', 'buckets', 'samples', 'repetitions')}
  record = {'machine': common.about_machine(None), 'load_before': load, 'settings': options | {'synthetic': about}}
  table = render(rows, failed, f'{args.dtype}, batch {args.batch_size}, from the CSV')
  common.finish('switches', record | {'rows': rows, 'failed': failed}, table, args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
