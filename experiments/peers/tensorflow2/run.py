"""TensorFlow 2 as a peer of dlrm_jax: the same model in graph mode, lazy Adam on one merged table. See README.md.

One line of JSON on stdout. `--mode speed` measures training, from the CSV itself or from memory; `--mode quality`
trains one epoch in file order and evaluates.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
import numpy as np
import tensorflow as tf
from model import Trainer
from reading import Csv, Memory
from shared import auc, log_loss, of_rates, report, sizes

EVAL_BATCH = 8192
WARM_UP_STEPS = 40


def speed(args: argparse.Namespace, trainer: Trainer, source: Csv | Memory) -> dict[str, object]:
  """Samples a second, the median over stretches of `--samples`; the steps of a stretch are a loop in the graph."""
  iterator = iter(source.batches('train', args.batch_size, repeat=True))

  @tf.function
  def run(steps: tf.Tensor) -> None:
    for _ in tf.range(steps):
      trainer.train(*next(iterator))

  run(tf.constant(WARM_UP_STEPS))
  steps, rates = max(1, args.samples // args.batch_size), []
  for _ in range(args.repetitions):
    start = time.perf_counter()
    run(tf.constant(steps))
    rates.append(steps * args.batch_size / (time.perf_counter() - start))
  return of_rates(rates)


def quality(args: argparse.Namespace, trainer: Trainer, source: Csv | Memory) -> dict[str, object]:
  """One epoch in file order, then evaluation of every row of the eval data."""

  @tf.function
  def epoch(dataset: tf.data.Dataset) -> None:
    for batch in dataset:
      trainer.train(*batch)

  predict = tf.function(trainer.predict, reduce_retracing=True)
  start = time.perf_counter()
  epoch(source.batches('train', args.batch_size, repeat=False))
  seconds = time.perf_counter() - start
  labels, logits = [], []
  for label, dense, row in source.batches('eval', EVAL_BATCH, repeat=False):
    labels.append(label.numpy())
    logits.append(predict(dense, row).numpy())
  label, logit = np.concatenate(labels), np.concatenate(logits)
  return {
    'auc': auc(label, logit),
    'log_loss': log_loss(label, logit),
    'train_seconds': round(seconds, 1),
    'steps': int(trainer.steps),
    'eval_rows': len(label),
  }


MODES = {'speed': speed, 'quality': quality}


def arguments(argv: list[str]) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = parser.add_argument
  add('--mode', choices=MODES, default='speed')
  add('--source', choices=('csv', 'memory'), default='csv', help='read the CSV itself, or arrays from memory')
  add('--csv', type=Path, help='folder with train.csv, and eval.csv for quality')
  add('--data', type=Path, help="memory: folder of the PyTorch twin's arrays; speed makes synthetic ones without it")
  add('--buckets', type=int, default=0, help='rows of every column; 0: the per-column sizes, 19,044,490 rows')
  add('--batch_size', type=int, default=512)
  add('--learning_rate', type=float, default=0.01)
  add('--interaction', choices=('cat', 'dot'), default='cat')
  add('--dtype', choices=('f32', 'bf16'), default='f32', help='bf16: the products of the MLPs; the rest stays f32')
  add('--seed', type=int, default=0, help='of the initial values and of synthetic arrays, never of the order')
  add('--threads', type=int, default=len(os.sched_getaffinity(0)))
  add('--repetitions', type=int, default=7, help='speed: timed stretches')
  add('--samples', type=int, default=65536, help='speed: samples of a stretch')
  add('--pool', type=int, default=262144, help='speed from memory: samples in memory, used in turn')
  args = parser.parse_args(argv)
  check(args)
  return args


def check(args: argparse.Namespace) -> None:
  """Ends the program with one line where the flags cannot work."""
  for name in ('batch_size', 'repetitions', 'samples', 'threads', 'pool'):
    if getattr(args, name) < 1:
      raise SystemExit(f'error: --{name} {getattr(args, name)}: give 1 or more')
  if args.buckets < 0:
    raise SystemExit(f'error: --buckets {args.buckets}: give the rows of every column, or 0 for the per-column sizes')
  if args.source == 'memory':
    if args.mode == 'quality' and not args.data:
      raise SystemExit('error: --mode quality --source memory needs --data FOLDER')
    return
  if not args.csv:
    raise SystemExit('error: --source csv needs --csv FOLDER with train.csv')
  for split in ('train', 'eval') if args.mode == 'quality' else ('train',):
    if not (args.csv / f'{split}.csv').is_file():
      raise SystemExit(f'error: no {split}.csv in {args.csv}; see --csv')


def main(argv: list[str]) -> None:
  """Runs one mode and prints its line of JSON."""
  args = arguments(argv)
  tf.config.threading.set_intra_op_parallelism_threads(args.threads)
  tf.config.threading.set_inter_op_parallelism_threads(args.threads)
  buckets = sizes(args.buckets)
  if args.source == 'csv':
    source = Csv(args.csv, buckets, args.threads)
  else:
    source = Memory(args.data, buckets, args.pool, args.seed)
  trainer = Trainer(sum(buckets), args.interaction, args.dtype == 'bf16', args.learning_rate, args.seed)
  result = MODES[args.mode](args, trainer, source)
  about = {
    'mode': args.mode,
    'source': args.source,
    'batch_size': args.batch_size,
    'rows': sum(buckets),
    'dtype': args.dtype,
    'optimizer': 'adam',
    'learning_rate': args.learning_rate,
    'interaction': args.interaction,
    'threads': args.threads,
    'seed': args.seed,
    'tensorflow': tf.__version__,
  }
  report(result, about)


if __name__ == '__main__':
  main(sys.argv[1:])
