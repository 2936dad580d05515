"""The PyTorch twin of dlrm_jax: same model, data order and hyperparameters, written for speed. See README.md.

One line of JSON on stdout. `--mode speed` measures training from memory, `--mode quality` trains one epoch over a
folder of arrays in the order given and evaluates, `--mode selfcheck` compares everything with independent numbers.
"""

import argparse
import contextlib
import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
# Rows are read at random: huge pages spare most page walks. PyTorch reads this before its first tensor.
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
import torch
from model import Dlrm
from shared import COLUMNS, DENSE, DIM, auc, check_buckets, log_loss, of_rates, report, sizes, synthetic
from tables import SLOTS, TABLES, DenseOptimizer, Table, fill_truncated_normal
from torch.nn import functional as F

EVAL_BATCH = 8192
WARM_UP_STEPS = 20
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # label f32[B], dense f32[B, 13], row i64[B, 26]


class Twin:
  """Model, table and optimizers; one `train` call is one step."""

  def __init__(self, args: argparse.Namespace, buckets: tuple[int, ...]):
    torch.manual_seed(args.seed)
    self.buckets = np.asarray(buckets, np.int64)
    self.offset = np.cumsum(self.buckets) - self.buckets
    self.model = Dlrm(args.interaction)
    self.table: Table = args.make_table(int(self.buckets.sum()), DIM, args.optimizer, args.learning_rate)
    fill_truncated_normal(self.table.value)
    self.optimizer = DenseOptimizer(list(self.model.parameters()), args.optimizer, args.learning_rate)
    self.forward = torch.compile(self.model) if args.compile else self.model
    self.bf16 = args.dtype == 'bf16'
    self.examples, self.steps = None, 0

  def precision(self) -> contextlib.AbstractContextManager:
    """Autocast of the MLPs to bfloat16 if asked for."""
    return torch.autocast('cpu', torch.bfloat16) if self.bf16 else contextlib.nullcontext()

  def train(self, label: torch.Tensor, dense: torch.Tensor, row: torch.Tensor) -> None:
    """One step on one batch of two examples or more."""
    if len(label) != self.examples:
      self.examples = len(label)
      self.model.set_batch_size(self.examples)
    vectors = self.table.pull(row)
    with self.precision():
      logit = self.forward(dense, vectors)
    F.binary_cross_entropy_with_logits(logit, label).backward()
    self.optimizer.step()
    self.table.push()
    self.steps += 1

  @torch.inference_mode()
  def predict(self, dense: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Logits `[B]` with the running statistics of batch norm."""
    with self.precision():
      return self.model(dense, self.table.lookup(row), self.steps)

  def rows(self, bucket: np.ndarray) -> torch.Tensor:
    """Rows i64[B, 26] of the merged table from buckets u32[B, 26]."""
    return torch.from_numpy(bucket + self.offset)


class Arrays:
  """The memory-mapped arrays of one split: label f32[N], dense f32[N, 13], bucket u32[N, 26]."""

  def __init__(self, folder: Path, split: str, buckets: tuple[int, ...]):
    self.label, self.dense, self.bucket = (
      np.load(folder / f'{split}_{name}.npy', mmap_mode='r') for name in ('label', 'dense', 'bucket')
    )
    rows = len(self.label)
    if self.dense.shape != (rows, DENSE) or self.bucket.shape != (rows, COLUMNS):
      raise SystemExit(f'{folder}: {split} has {rows} labels, dense {self.dense.shape}, bucket {self.bucket.shape}')
    check_buckets(f'{folder}: {split}', self.bucket, buckets)

  def batches(self, size: int, twin: Twin) -> Iterator[Batch]:
    """Batches in the order of the file, the last one smaller."""
    for start in range(0, len(self.label), size):
      part = slice(start, start + size)
      label, dense = (torch.from_numpy(np.array(array[part])) for array in (self.label, self.dense))
      yield label, dense, twin.rows(self.bucket[part])


def speed(args: argparse.Namespace, buckets: tuple[int, ...]) -> dict[str, object]:
  """Steps over batches that all lie in memory, ids already hashed and offset: median over repetitions."""
  twin = Twin(args, buckets)
  if args.data:
    arrays = Arrays(args.data, 'train', buckets)
    arrays = [array[: args.pool] for array in (arrays.label, arrays.dense, arrays.bucket)]
  else:
    arrays = synthetic(args.pool, buckets, args.seed)
  label, dense, bucket = (np.array(array) for array in arrays)
  tensors = (torch.from_numpy(label), torch.from_numpy(dense), twin.rows(bucket))
  pool = [batch for batch in zip(*(t.split(args.batch_size) for t in tensors), strict=True)]
  pool = [batch for batch in pool if len(batch[0]) == args.batch_size]
  if not pool:
    raise SystemExit(f'{len(label)} samples are no batch of {args.batch_size}: use a larger --pool or more data')
  steps = max(1, args.samples // args.batch_size)
  rates, place = [], 0
  for repetition in range(args.repetitions + 1):
    start = time.perf_counter()
    for _ in range(steps if repetition else WARM_UP_STEPS):
      twin.train(*pool[place % len(pool)])
      place += 1
    if repetition:
      rates.append(steps * args.batch_size / (time.perf_counter() - start))
  return of_rates(rates)


def quality(args: argparse.Namespace, buckets: tuple[int, ...]) -> dict[str, object]:
  """One epoch in the order of the files, then evaluation of every row of the eval arrays."""
  if not args.data:
    raise SystemExit('--mode quality needs --data FOLDER with train_label.npy, train_dense.npy, ... (README.md)')
  train, evaluation = (Arrays(args.data, split, buckets) for split in ('train', 'eval'))
  twin = Twin(args, buckets)
  start, samples = time.perf_counter(), 0
  for batch in train.batches(args.batch_size, twin):
    if twin.steps == WARM_UP_STEPS:
      start, samples = time.perf_counter(), 0
    twin.train(*batch)
    samples += len(batch[0])
  rate = samples / (time.perf_counter() - start)
  logits = [twin.predict(dense, row).numpy() for _, dense, row in evaluation.batches(EVAL_BATCH, twin)]
  logit, label = np.concatenate(logits), np.asarray(evaluation.label)
  return {
    'auc': auc(label, logit),
    'log_loss': log_loss(label, logit),
    'samples_per_second': round(rate, 1),
    'steps': twin.steps,
    'eval_rows': len(label),
  }


def check() -> dict[str, object]:
  """See selfcheck.py."""
  import selfcheck

  return selfcheck.run()


def arguments(
  argv: list[str], tables: Mapping[str, Callable[..., Table]], optimizers: tuple[str, ...]
) -> argparse.Namespace:
  """The command line; of tables and optimizers the first ones are the defaults."""
  parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = parser.add_argument
  add('--mode', choices=('speed', 'quality', 'selfcheck'), default='speed')
  add('--data', type=Path, help='folder of arrays; speed makes synthetic ones without it')
  add('--buckets', type=int, default=0, help='rows of every column; 0: the per-column sizes, 19,044,490 rows')
  add('--batch_size', type=int, default=512)
  add('--optimizer', choices=optimizers, default=optimizers[0])
  add('--learning_rate', type=float, default=0.01)
  add('--interaction', choices=('cat', 'dot'), default='cat')
  add('--dtype', choices=('f32', 'bf16'), default='f32', help='bf16: autocast of the MLPs; the rest stays f32')
  add('--compile', action='store_true', help='torch.compile of the model (needs a C++ compiler)')
  add('--table', choices=tables, default=next(iter(tables)), help='see README.md')
  add('--seed', type=int, default=0, help='of the initial values (and of synthetic data), never of the order')
  add('--threads', type=int, default=2)
  add('--repetitions', type=int, default=7, help='speed: timed stretches')
  add('--samples', type=int, default=65536, help='speed: samples of a stretch')
  add('--pool', type=int, default=262144, help='speed: samples in memory, used in turn')
  args = parser.parse_args(argv)
  args.make_table = tables[args.table]
  return args


def keep_freed_memory() -> None:
  """Lets glibc keep what a step frees for the next one: at batch 8192 page faults took 4 to 10 % of a step.

  PyTorch's tuning guide advises another allocator for it, jemalloc or tcmalloc.
  """
  if platform.libc_ver()[0] == 'glibc':
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 25)  # the most that glibc allows
    ctypes.CDLL(None).mallopt(m_trim_threshold, (1 << 31) - 1)


def main(
  argv: list[str],
  tables: Mapping[str, Callable[..., Table]] = TABLES,
  optimizers: tuple[str, ...] = tuple(SLOTS),
  check: Callable[[], dict[str, object]] = check,
) -> None:
  """Runs one mode and prints its line of JSON. Another peer passes tables, optimizers and a selfcheck of its own."""
  args = arguments(argv, tables, optimizers)
  torch.set_num_threads(args.threads)
  keep_freed_memory()
  buckets = sizes(args.buckets)
  about = {
    'mode': args.mode,
    'batch_size': args.batch_size,
    'rows': sum(buckets),
    'dtype': args.dtype,
    'optimizer': args.optimizer,
    'interaction': args.interaction,
    'table': args.table,
    'compile': args.compile,
    'threads': args.threads,
    'seed': args.seed,
    'torch': torch.__version__,
  }
  result = check() if args.mode == 'selfcheck' else {'speed': speed, 'quality': quality}[args.mode](args, buckets)
  report(result, about)


if __name__ == '__main__':
  main(sys.argv[1:])
