"""The tables of benchmark.py: medians, ranges and ratios of what was measured."""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import common, limits, step_parts
from experiments.benchmark_rows import EAGER, SMALL, TF1, TF2, TORCH, Row, small
from experiments.measurements import Loaded, Rates

Ratio = dict[int, float]  # by repetition
COLUMNS = {'memory': 'compute only', 'csv': 'from the CSV'}


@dataclasses.dataclass
class Measured:
  """Everything, by repetition, counted from 0."""

  rates: dict[str, dict[int, dict[int, Rates]]] = dataclasses.field(default_factory=dict)  # by name and batch size
  loads: dict[str, dict[int, Loaded]] = dataclasses.field(default_factory=dict)  # by name
  limits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  parts: dict[str, dict[str, step_parts.Parts]] = dataclasses.field(default_factory=dict)  # by dtype and batch size
  failed: dict[str, str] = dataclasses.field(default_factory=dict)  # what was not measured, and why

  def rate(self, names: Iterable[str], size: int, column: str) -> Ratio:
    """The best rate of these rows at a batch size, of each repetition that has one."""
    out = {}
    for name in names:
      for repetition, rates in self.rates.get(name, {}).get(size, {}).items():
        rate = getattr(rates, column)
        if rate is not None:
          out[repetition] = max(rate, out.get(repetition, 0))
    return out

  def limit(self, dtype: str, size: int) -> Ratio:
    """The samples/s that the network's matrix products alone allow."""
    return {repetition: one['samples_per_second'][dtype][str(size)] for repetition, one in enumerate(self.limits)}


def best(rates: Rates) -> float:
  """The faster of the two rates of a repetition."""
  return max(rates.memory or 0, rates.csv or 0)


def divide(above: Ratio, below: Ratio) -> Ratio:
  """Ratios within the repetitions that both have."""
  return {repetition: above[repetition] / below[repetition] for repetition in above if repetition in below}


def ratios(rows: Sequence[Row], sizes: Sequence[int], measured: Measured) -> dict[str, Ratio]:
  """What is compared, by a line of text; without those of which nothing was measured."""
  out, rate = {}, measured.rate
  of_kind = lambda kind: [row.name for row in rows if kind in row.kinds]
  for dtype in limits.DTYPES:
    name = f'dlrm_jax {dtype}'
    for size in sizes:
      at, csv, memory = f'{name}, batch {size}', rate([name], size, 'csv'), rate([name], size, 'memory')
      for kind in (TF1, TF2):
        out[f'{at}, from the CSV / {kind} from the CSV'] = divide(csv, rate(of_kind(kind), size, 'csv'))
      for kind in (EAGER, TORCH):
        out[f'{at}, from the CSV / best {kind} in memory'] = divide(csv, rate(of_kind(kind), size, 'memory'))
      out[f'{at}, compute only / its matrix products alone'] = divide(memory, measured.limit(dtype, size))
      out[f'{at}, from the CSV / compute only'] = divide(csv, memory)
      for column, text in COLUMNS.items():
        here = rate([name], size, column)
        out[f'{at}, {text} / the same with {SMALL:,} buckets'] = divide(here, rate([small(name)], size, column))
        if size != sizes[0]:
          out[f'{at}, {text} / batch {sizes[0]}'] = divide(here, rate([name], sizes[0], column))
      out[f"{at}, from the CSV: the loader's processor time / that of all cores"] = loader_share(csv, measured)
  return {name: ratio for name, ratio in out.items() if ratio}


def loader_share(csv: Ratio, measured: Measured) -> Ratio:
  """Share of all cores' time that parsing takes at these rates, by the loader's processor time alone on one thread."""
  loads = measured.loads.get('loader, one thread', {})
  return {i: csv[i] * loads[i].processor_us * 1e-6 / common.CORES for i in csv if i in loads}


def spread(values: Iterable[float], form: str = ',.0f') -> list[str]:
  """Median and range; the range is empty for one value, and both for none."""
  values = list(values)
  if not values:
    return ['', '']
  text = f'{min(values):{form}}-{max(values):{form}}' if len(values) > 1 else ''
  return [f'{statistics.median(values):{form}}', text]


def render(args: argparse.Namespace, rows: Sequence[Row], measured: Measured) -> str:
  """All tables."""
  parts = [render_rates(args, rows, size, measured) for size in args.batch_sizes]
  if measured.failed:
    parts.append(common.table(['not measured', 'why'], measured.failed.items()))
  if measured.loads:
    parts.append(render_loads(measured.loads))
  compared = ratios(rows, args.batch_sizes, measured)
  if compared:
    lines = [[name, *spread(ratio.values(), '.2f')] for name, ratio in compared.items()]
    parts.append(common.table(['ratios within a repetition', 'median', 'range'], lines))
  parts.append(limits.render(measured.limits[-1]))
  if measured.parts:
    parts.append(step_parts.render(measured.parts))
  return '\n\n'.join(parts)


def render_rates(args: argparse.Namespace, rows: Sequence[Row], size: int, measured: Measured) -> str:
  """The table of one batch size."""
  lines = []
  for row in rows:
    repetitions = measured.rates.get(row.name, {}).get(size, {})
    if not repetitions:
      continue
    memory, csv = (spread(measured.rate([row.name], size, column).values()) for column in COLUMNS)
    fastest = {repetition: best(rates) for repetition, rates in repetitions.items()}
    share, _ = spread(divide(fastest, measured.limit(row.dtype, size)).values(), '.2f')
    peak = f'{max(rates.peak_gb for rates in repetitions.values()):.2f}'
    quality = quality_of(row.quality, size, row.buckets, args.interaction)
    lines.append([row.name, *memory, *csv, share, peak, *quality])
  header = ['in memory', 'range', 'from the CSV', 'range', 'of limit', 'peak, GB', 'AUC', 'log loss']
  return common.table([f'batch {size}: samples/s', *header], lines)


def render_loads(loads: dict[str, dict[int, Loaded]]) -> str:
  """The loader's table."""
  lines = []
  for name, of in loads.items():
    rates, times = ([getattr(one, field) for one in of.values()] for field in ('rate', 'processor_us'))
    peak = max(one.peak_gb for one in of.values())
    lines.append([name, *spread(rates), spread(times, '.2f')[0], f'{peak:.2f}'])
  return common.table(['loader alone', 'rows/s', 'range', 'processor time of a row, us', 'peak, GB'], lines)


def quality_of(name: str, batch_size: int, buckets: int, interaction: str, folder: Path = common.RECORDS) -> list[str]:
  """Mean AUC and log loss of a system in the newest record of quality.py with these settings; empty without one."""
  wanted = {'batch_size': batch_size, 'buckets': buckets, 'interaction': interaction}
  for path in sorted(folder.glob('quality_*.json'), reverse=True):
    record = json.loads(path.read_text())
    runs = record['runs'].get(name)
    if runs and all(record['settings'].get(field) == value for field, value in wanted.items()):
      return [f'{statistics.fmean(run[metric] for run in runs):.5f}' for metric in ('auc', 'log_loss')]
  return ['', '']


def to_json(args: argparse.Namespace, rows: Sequence[Row], measured: Measured) -> dict[str, Any]:
  """Everything, for the record: of every row and batch size a list of repetitions."""
  listed = lambda of: [{'repetition': number, **one._asdict()} for number, one in of.items()]
  return {
    'rates': {name: {str(size): listed(of) for size, of in sizes.items()} for name, sizes in measured.rates.items()},
    'loads': {name: listed(of) for name, of in measured.loads.items()},
    'limits': measured.limits,
    'parts': measured.parts,
    'ratios': {name: list(ratio.values()) for name, ratio in ratios(rows, args.batch_sizes, measured).items()},
    'failed': measured.failed,
  }
