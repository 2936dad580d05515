"""The tables of variables.py: medians, ranges and ratios, and directories beside what they were to be."""

import statistics
from typing import Any

from experiments import common
from experiments.benchmark_tables import spread

STATIC = 'static'
# Load of a directory -> share of ids without a place (embeddings/directory.py).
PROMISED = {0.55: 3e-6, 0.6: 2e-5, 0.75: 7e-4, 0.8: 2e-3}


def render(record: dict[str, Any]) -> str:
  """All tables of a record."""
  about = record['settings']['synthetic']
  tables = [render_speed(title, rows) for title, rows in record['speed'].items()]
  if record['quality']:
    tables.append(render_quality(record['quality'], record['data'], about and about['eval']))
  if record['failed']:
    tables.append(common.table(['not measured', 'why'], record['failed'].items()))
  return '\n\n'.join(tables)


def render_speed(title: str, rows: dict[str, dict[str, dict[str, Any]]]) -> str:
  """The table of one size and batch size."""
  lines = []
  for name, of in rows.items():
    words = []
    for place in (0, -1):
      rates = {repetition: one['passes'][place] for repetition, one in of.items()}
      static = {repetition: one['passes'][place] for repetition, one in rows.get(STATIC, {}).items()}
      shares = [rate / static[repetition] for repetition, rate in rates.items() if repetition in static]
      words += [*spread(rates.values()), *(spread(shares, '.2f') if name != STATIC else ('', ''))]
    middle = lambda field, of=of: statistics.median(one[field] for one in of.values())
    growths = f'{middle("grown"):.0f} ({middle("growth_seconds"):.1f} s)'
    memory = [f'{middle(field):.2f}' for field in ('computed_gb', 'measured_gb', 'peak_gb')]
    lines.append([name, *words, f'{middle("new_share"):.1%}', growths, *memory])
  of_phase = lambda phase: [f'{phase}, samples/s', 'range', 'of static', 'range']
  header = [*of_phase('filling'), *of_phase('known'), 'new ids', 'growths', 'computed, GB', 'measured, GB', 'peak, GB']
  return common.table([title, *header], lines)


def promised(load: float) -> str:
  """Share of ids without a place that a directory promises at a load: that of the next one that it tells of."""
  return next((f'< {share:.4%}' for known, share in PROMISED.items() if load <= known), '')


def render_quality(rows: dict[str, dict[str, Any]], data: dict[str, int], best: dict[str, Any] | None) -> str:
  """Quality, and the directories beside what they were to be."""
  lines, directories = [], []
  for name, row in rows.items():
    rate = row['samples_per_second']
    memory = [f'{row[field]:.2f}' for field in ('computed_gb', 'tables_gb', 'peak_gb')]
    lines.append([name, f'{row["auc"]:.5f}', f'{row["log_loss"]:.5f}', f'{rate:,.0f}' if rate else '', *memory])
    if name == STATIC:
      continue
    whole = row['lookups_refused'] == 0  # only then the directory was to have all ids
    planned, lost = data['ids'] / row['first_rows'], 1 - row['ids'] / data['ids']
    plan = [f'{data["ids"]:,}', f'{planned:.3f}', promised(planned)] if whole else ['', '', '']
    lookups = row['lookups_unplaced'] / (data['rows'] * 26)
    directories.append([
      name, f'{row["first_rows"]:,}', f'{row["rows"]:,}', plan[0], f'{row["ids"]:,}', plan[1], f'{row["load"]:.3f}',
      plan[2], f'{lost:.4%}' if whole else '', f'{lookups:.4%}',
    ])  # fmt: skip
  if best:
    lines.append(['best possible', f'{best["best_auc"]:.5f}', f'{best["best_log_loss"]:.5f}', '', '', '', ''])
  header = ['AUC', 'log loss', 'samples/s', 'tables computed, GB', 'at the end, GB', 'peak, GB']
  names = [
    'first rows', 'last rows', 'ids of the file', 'ids', 'load planned', 'load', 'without a place: promised', 'ids',
    'lookups',
  ]  # fmt: skip
  return '\n\n'.join([common.table(['one epoch', *header], lines), common.table(['directory', *names], directories)])
