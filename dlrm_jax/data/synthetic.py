"""A synthetic data set with the structure of Criteo's: `python -m dlrm_jax.data.synthetic --rows 8000000 --out data`.

The model of the data. Each row has a hidden inclination to click. It draws a fine id in each of three hierarchies
(C3 -> C12 -> C21 -> C16 -> C4 -> C24, C15 -> C18 -> C2 with C15 -> C14, C7 -> C11 -> C13 with C7 -> C9) from a
heavy-tailed distribution; the coarser ids are fixed functions of the finer ones, but for a second C11 in a few rows.
The other category columns have distributions of their own. Some ids are replaced by new ones at a moment of the file.
Every id has an effect on the click and hidden factors, which are functions of its hash; of two candidate ids an
inclined row takes the one with the larger effect. The inclination also shifts the normal numbers behind the thirteen
integers (a Gaussian copula with the measured quantile functions), so that, as in the real data, the columns say partly
the same. Some columns are missing together. The label is drawn from probability = sigmoid(effects of the ids + effects
of the integers + effects of what is missing + products of pairs of factors or integers + a rate that changes over
seven days): a function of what the row shows and of its time, so that the best possible AUC and log loss are known. A
linear model cannot learn the products. The world (ids and their effects) is fixed; the seed draws the rows.
"""

import argparse
import collections
import collections.abc
import concurrent.futures
import json
import multiprocessing
import pathlib
import sys

import numpy as np

from dlrm_jax.cores import usable_cores
from dlrm_jax.data import synthetic_csv
from dlrm_jax.data.synthetic_rows import BLOCK, draw_block, world


class Best:
  """What a model that knew the probabilities would reach on the drawn labels.

  The log loss is exact; the AUC is of the probability in 2^16 equal bins of its score, ties counting half, which
  differs from the exact one by less than 1e-5.
  """

  BINS, LIMIT = 1 << 16, 12.0

  def __init__(self) -> None:
    self.count = np.zeros((2, self.BINS), np.int64)
    self.loss = 0.0

  def add(self, label: np.ndarray, probability: np.ndarray) -> None:
    """Counts a block."""
    score = np.log(probability) - np.log1p(-probability)
    place = np.clip((score + self.LIMIT) * (self.BINS / (2 * self.LIMIT)), 0, self.BINS - 1).astype(np.int64)
    for value in (0, 1):
      self.count[value] += np.bincount(place[label == value], minlength=self.BINS)
    self.loss -= float(np.log(np.where(label, probability, 1 - probability)).sum())

  def summary(self) -> dict[str, float | int | None]:
    """Rows, click rate, and the best possible AUC, log loss and normalized entropy; null where there is one class."""
    negative, positive = self.count.sum(axis=1).tolist()
    rows = negative + positive
    rate = positive / rows
    out = {'rows': rows, 'click_rate': rate, 'best_auc': None, 'best_log_loss': self.loss / rows}
    out['best_normalized_entropy'] = None
    if negative and positive:
      below = np.cumsum(self.count[0]) - self.count[0] / 2
      out['best_auc'] = float((self.count[1] * below).sum() / (negative * positive))
      entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
      out['best_normalized_entropy'] = float(out['best_log_loss'] / entropy)
    return out


def _render(task: tuple[int, int, int, int]) -> tuple[int, bytes, bytes, np.ndarray, np.ndarray]:
  """A block as text, cut where the training file ends: runs in the workers."""
  seed, index, rows, total = task
  size = min(BLOCK, total - index * BLOCK)
  block = draw_block(world(), seed, index, size, total)
  cut = min(max(rows - index * BLOCK, 0), size)
  parts = [
    synthetic_csv.format_rows(block.label[p], block.integer[:, p], block.id[:, p], block.missing[:, p])
    for p in (slice(cut), slice(cut, size))
  ]
  return cut, *parts, block.label, block.probability


def _in_order(tasks: list, workers: int) -> collections.abc.Iterator:
  """Results of the tasks in their order, at most two of them for each worker in memory."""
  if workers == 1:
    yield from map(_render, tasks)
    return
  context = multiprocessing.get_context('spawn')  # a fork of a program with threads (JAX's) may hang
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    waiting = collections.deque()
    for task in tasks:
      waiting.append(pool.submit(_render, task))
      if len(waiting) > 2 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def generate(out: pathlib.Path, rows: int, eval_rows: int, seed: int, processes: int) -> dict:
  """Writes train.csv, eval.csv and synthetic.json under `out` and returns what the last one says.

  The files appear under their names when all of them are complete; their bytes depend on rows, eval_rows and seed only.
  """
  total = rows + eval_rows
  tasks = [(seed, index, rows, total) for index in range(-(-total // BLOCK))]
  out.mkdir(parents=True, exist_ok=True)
  names = ('train.csv', 'eval.csv', 'synthetic.json')
  partial = [out / f'{name}.partial' for name in names]
  best = Best(), Best()
  with open(partial[0], 'wb') as train, open(partial[1], 'wb') as evaluation:
    for cut, train_text, eval_text, label, probability in _in_order(tasks, processes):
      train.write(train_text)
      evaluation.write(eval_text)
      for part, p in zip(best, (slice(cut), slice(cut, None)), strict=True):
        part.add(label[p], probability[p])
  report = {'seed': seed, 'train': best[0].summary(), 'eval': best[1].summary(), 'auc_from': '65536 bins of the score'}
  partial[2].write_text(json.dumps(report, indent=2) + '\n')
  for source, name in zip(partial, names, strict=True):
    source.replace(out / name)
  return report


def _arguments(argv: list[str] | None) -> argparse.Namespace:
  """Parsed and checked; a wrong one ends the program with one line."""
  parser = argparse.ArgumentParser(prog='dlrm_jax.data.synthetic', description=__doc__.splitlines()[0])
  parser.error = lambda message: sys.exit(f'error: {message}')
  parser.add_argument('--rows', type=int, required=True, help='rows of train.csv')
  parser.add_argument('--eval_rows', type=int, help='rows of eval.csv, which continues in time (default: rows // 4)')
  parser.add_argument('--out', type=pathlib.Path, required=True, help='folder to write')
  parser.add_argument('--seed', type=int, default=0, help='of the rows; the ids and their effects are always the same')
  parser.add_argument('--processes', type=int, help='workers; the files do not depend on it (default: the processors)')
  args = parser.parse_args(argv)
  args.eval_rows = max(1, args.rows // 4) if args.eval_rows is None else args.eval_rows
  args.processes = len(usable_cores()) if args.processes is None else args.processes
  for name, low in (('rows', 1), ('eval_rows', 1), ('seed', 0), ('processes', 1)):
    if getattr(args, name) < low:
      parser.error(f'--{name}={getattr(args, name)}: must be at least {low}')
  if args.out.exists() and not args.out.is_dir():
    parser.error(f'--out={args.out}: is a file; name a folder')
  return args


def main(argv: list[str] | None = None) -> None:
  """Writes the files and prints the report as one line of JSON."""
  args = _arguments(argv)
  try:
    report = generate(args.out, args.rows, args.eval_rows, args.seed, args.processes)
  except OSError as error:
    sys.exit(f'error: --out={args.out}: {error}')
  print(json.dumps(report))


if __name__ == '__main__':
  main()
