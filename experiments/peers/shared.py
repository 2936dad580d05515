"""What the peers share, whatever their framework: sizes, synthetic arrays, metrics, and the line that a run prints.

Runs on Python 3.7 too, which TensorFlow 1.15 needs; of other packages it takes numpy alone.
"""

from __future__ import annotations

import json
import resource
import statistics

import numpy as np

DENSE, COLUMNS, DIM = 13, 26, 16
# C1..C26: DeepRec's modelzoo/DLRM/train.py sizes with C13 and C15, which are misaligned there, swapped.
BUCKETS = (
  *(2500, 2000, 5000000, 1500000, 1000, 100, 20000, 4000, 20, 100000, 10000, 5000000, 100),
  *(100, 40000, 3000000, 50, 10000, 4000, 20, 4000000, 100, 100, 250000, 400, 100000),
)
CHUNK = 65536  # rows of an array, which may be a file, that are looked at at once


def sizes(buckets: int) -> tuple[int, ...]:
  """Rows of each column for the flag --buckets: that number of every column, or 0 for BUCKETS."""
  return (buckets,) * COLUMNS if buckets else BUCKETS


def check_buckets(where: str, bucket: np.ndarray, sizes: tuple[int, ...]) -> None:
  """Ends the program with one line if `bucket[N, 26]` has one past its column's end: silently another column's row."""
  top = np.max([bucket[start : start + CHUNK].max(0) for start in range(0, len(bucket), CHUNK)], 0)
  for column in np.flatnonzero(top >= np.asarray(sizes)):
    raise SystemExit(f'error: {where} C{column + 1} has bucket {top[column]} of {sizes[column]}; see --buckets')


def synthetic(rows: int, sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Label, dense and bucket of `rows` examples; buckets are Zipf-like (log-uniform ranks, spread over the column)."""
  rng = np.random.default_rng(seed)
  sizes = np.asarray(sizes)
  rank = np.exp(rng.random((rows, COLUMNS)) * np.log(sizes + 1)).astype(np.int64) - 1
  label = (rng.random(rows) < 0.256).astype(np.float32)
  return label, rng.standard_normal((rows, DENSE), np.float32), (rank * 2654435761 % sizes).astype(np.uint32)


def auc(label: np.ndarray, score: np.ndarray) -> float:
  """Exact area under the ROC curve of `[N]`: the rank sum of the positives, ties by mid-ranks; NaN for one class."""
  _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
  rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
  positives = int((label > 0.5).sum())
  negatives = len(label) - positives
  if not positives or not negatives:
    return float('nan')
  return float((rank[label > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(label: np.ndarray, logit: np.ndarray) -> float:
  """Mean binary cross entropy in float64."""
  logit = logit.astype(np.float64)
  return float(np.mean(np.logaddexp(0, logit) - label * logit))


def of_rates(rates: list[float]) -> dict[str, object]:
  """The result of `--mode speed`: the median over the stretches, and their range."""
  return {
    'samples_per_second': round(statistics.median(rates), 1),
    'min': round(min(rates), 1),
    'max': round(max(rates), 1),
    'repetitions': len(rates),
  }


def report(result: dict[str, object], about: dict[str, object]) -> None:
  """The one line of JSON on stdout."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({**result, **about, 'peak_rss_bytes': peak}))
