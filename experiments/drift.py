"""Does memory stay flat where ids come and go? `python -m experiments.drift --help`.

A stream of days: in five columns a share of the ids dies each day and new ones take their place; the click depends on
the ids. The program trains through the days in the order of time, without eviction, with eviction of those that were
not seen for some days, and of those with short vectors; it is evaluated on the day after the last. Told at the end of
each day: ids, load and rows of the directory, and the memory of the process, by what the system says of it.

The default takes about three minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dlrm_jax.data.synthetic_csv import format_rows
from experiments import common

DRIFTING, COLUMNS = (2, 3, 11, 15, 20), 26
SLOTS, STEADY = 4_000, 200  # ids that live at once: of a drifting column, of another
FLATTEN = 20  # the n-th of a column's ids is as frequent as 1 / (n + FLATTEN)
POLL_SECONDS = 0.05
EVICTIONS = ('never', 'global_step', 'l2')


class Days:
  """The stream; a function of the seed."""

  def __init__(self, share: float, seed: int) -> None:
    self.share, self.rng = share, np.random.default_rng(seed)
    # Which of the ids that one after another have a slot lives now.
    self.generation = {column: np.zeros(SLOTS, np.uint64) for column in DRIFTING}

  def draw(self, rows: int) -> bytes:
    """The lines of the next day."""
    ids, score = np.empty((COLUMNS, rows), np.uint32), np.full(rows, -1.2)
    for column in range(COLUMNS):
      slots = SLOTS if column in DRIFTING else STEADY
      weight = 1 / (np.arange(slots) + FLATTEN)
      slot = self.rng.choice(slots, rows, p=weight / weight.sum()).astype(np.uint64)
      generation = self.generation[column][slot] if column in DRIFTING else np.uint64(0)
      word = mix((slot << np.uint64(24) | generation) << np.uint64(8) | np.uint64(column))
      ids[column] = word >> np.uint64(32)
      # An effect between -1 and 1 for each id, from the half of the hash that the id does not show.
      score += (0.8 if column in DRIFTING else 0.2) * ((word & np.uint64(0xFFFFFFFF)).astype(float) / 2**31 - 1)
    for generation in self.generation.values():
      generation[self.rng.random(SLOTS) < self.share] += np.uint64(1)
    label = (self.rng.random(rows) < 1 / (1 + np.exp(-score))).astype(np.uint8)
    integers = self.rng.integers(0, 100, (13, rows)).astype(np.int32)
    return format_rows(label, integers, ids, np.zeros((39, rows), bool))


def mix(word: np.ndarray) -> np.ndarray:
  """SplitMix64's finalizer: every bit of u64[n] reaches every bit."""
  word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return word ^ word >> np.uint64(31)


def write(args: argparse.Namespace, folder: Path) -> None:
  """train.csv of all days, eval.csv of the day after."""
  days, rows = Days(args.share, args.seed), args.steps_per_day * args.batch_size
  with (folder / 'train.csv').open('wb') as file:
    for _ in range(args.days):
      file.write(days.draw(rows))
  (folder / 'eval.csv').write_bytes(days.draw(rows))


def train(args: argparse.Namespace, eviction: str, data: Path, output: Path) -> dict[str, Any]:
  """One run of the program: its result, and of each day what its log says and its memory in GB."""
  settings = {
    'embedding.eviction.name': eviction,
    'embedding.eviction.every': args.steps_per_day,
    'embedding.eviction.steps_to_live': args.days_to_live * args.steps_per_day,
    'embedding.eviction.l2': args.l2,
    'embedding.rows': args.directory_rows,
    'data.streams': 1, 'data.shuffle_rows': 0, 'log_every': args.steps_per_day, 'checkpoint': output,
  }  # fmt: skip
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  command = common.dlrm_jax('dynamic', data, output, 0, args.batch_size, *flags)
  lines, days = output / 'metrics.jsonl', []
  with tempfile.TemporaryFile('w+') as errors:
    child = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
      while child.poll() is None:
        days += [{'memory_gb': resident_gb(child.pid)} for _ in range(count(lines) - len(days))]
        time.sleep(POLL_SECONDS)
    except BaseException:
      child.kill()
      child.wait()
      raise
    with child.stdout:  # one line, so the child never waited for it to be read
      output = child.stdout.read()
    errors.seek(0)
    if child.returncode:
      raise common.Failed(f'exit code {child.returncode}: {common.last_words(errors.read())}')
  result = json.loads(output)
  logged = [record for record in map(json.loads, lines.read_text().splitlines()) if record['kind'] == 'train']
  names = ('loss', 'ids', 'load', 'ids_evicted', 'lookups_unplaced')
  for day, record in zip(days, logged, strict=False):
    day |= {name: record[name] for name in names} | {'rows': round(record['ids'] / record['load'])}
  names = ('auc', 'log_loss', 'samples_per_second', 'peak_memory_gb')
  return {name: result[name] for name in names} | {'days': [day for day in days if 'ids' in day]}


def count(path: Path) -> int:
  """Lines of a file that may not be there yet."""
  return path.read_bytes().count(b'\n') if path.exists() else 0


def resident_gb(pid: int) -> float:
  """Memory of a process; 0 if it has just ended."""
  try:
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
  except (FileNotFoundError, ProcessLookupError, IndexError):
    return 0.0
  return round(pages * 4096 / 1e9, 3)


def growth(days: list[dict[str, Any]], name: str) -> float:
  """Of the second half of the days: the last day's figure over that of the day before the half."""
  return days[-1][name] / days[max(0, len(days) // 2 - 1)][name]


def render(results: dict[str, dict[str, Any]]) -> str:
  """A table of the days, and one of the runs."""
  header, lines = ['end of day'], []
  for name in results:
    header += [f'{name}: ids', 'load', 'rows', 'memory, GB']
  for day in range(max(len(result['days']) for result in results.values())):
    words = [str(day + 1)]
    for result in results.values():
      one = result['days'][day] if day < len(result['days']) else None
      shown = one and [f'{one["ids"]:,}', f'{one["load"]:.2f}', f'{one["rows"]:,}', f'{one["memory_gb"]:.2f}']
      words += shown or [''] * 4
    lines.append(words)
  runs = [
    [
      name, f'{result["auc"]:.5f}', f'{result["log_loss"]:.5f}', f'{result["days"][-1]["ids_evicted"]:,}',
      *(f'{growth(result["days"], part):.2f}' for part in ('ids', 'rows', 'memory_gb')),
    ]
    for name, result in results.items()
  ]  # fmt: skip
  header_of_runs = ['eviction', 'AUC', 'log loss', 'evicted', 'second half: ids x', 'rows x', 'memory x']
  return f'{common.table(header, lines)}\n\n{common.table(header_of_runs, runs)}'


def main(argv: list[str]) -> None:
  """Trains everything, prints the tables and writes the record."""
  parser = common.parser('drift', __doc__)
  numbers = {
    'days': (24, 'of the stream'), 'steps_per_day': (40, 'of training'), 'batch_size': (512, ''), 'seed': (0, ''),
    'days_to_live': (3, 'global_step: unseen for longer than this'), 'directory_rows': (1 << 15, 'of the first tables'),
  }  # fmt: skip
  for name, (default, text) in numbers.items():
    parser.add_argument(f'--{name}', type=int, default=default, help=f'{text} ({default})')
  parser.add_argument('--share', type=float, default=0.1, help='of the ids that die each day (0.1)')
  parser.add_argument('--l2', type=float, default=0.1, help='l2: half of the squared length of a short vector (0.1)')
  args = parser.parse_args(argv)
  results = {}
  try:
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      write(args, folder)
      for eviction in EVICTIONS:
        results[eviction] = train(args, eviction, folder, folder / eviction)
        common.say(f'{eviction}: AUC {results[eviction]["auc"]:.5f}, {results[eviction]["days"][-1]}')
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  settings = {name: getattr(args, name) for name in (*numbers, 'share', 'l2')}
  record = {'machine': common.about_machine(None), 'settings': settings, 'runs': results}
  common.finish('drift', record, render(results), args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
