"""The seed's program on community TensorFlow 1.15.5 as a peer of dlrm_jax. See README.md.

One line of JSON on stdout. `--mode speed` measures training from the CSV; `--mode quality` trains one epoch in file
order and evaluates. Runs on Python 3.7.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

if sys.version_info[:2] != (3, 7):
  raise SystemExit(
    f'error: TensorFlow 1.15 needs Python 3.7 and this is {sys.version_info[0]}.{sys.version_info[1]}: see README.md'
  )

import warnings

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np
import tensorflow as tf
from shared import auc, of_rates, report, sizes

import seed_program

tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)
SHUFFLE_SEED = 2021
WARM_UP_STEPS = 40


def log_loss(label: np.ndarray, probability: np.ndarray) -> float:
  """Mean binary cross entropy in float64, of probabilities kept 1e-7 away from 0 and 1."""
  p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
  return float(-np.mean(np.where(label > 0.5, np.log(p), np.log1p(-p))))


def configuration(threads: int) -> tf.ConfigProto:
  """Of a session. threads: 0 leaves the choice to TensorFlow, which takes as many as there are cores."""
  return tf.ConfigProto(inter_op_parallelism_threads=threads, intra_op_parallelism_threads=threads)


def speed(args: argparse.Namespace, buckets: tuple[int, ...]) -> dict[str, object]:
  """Samples a second, the median over stretches of `--samples`; a step is one `run` of the monitored session, which
  writes no checkpoints (the seed's `--no_eval` with save_steps 0)."""
  dataset = seed_program.batches(os.path.join(args.csv, 'train.csv'), args.batch_size, None, SHUFFLE_SEED)
  features, label = tf.data.make_one_shot_iterator(dataset).get_next()
  probability = seed_program.network(features, buckets, args.interaction)
  loss = seed_program.binary_cross_entropy(label, probability)
  train = seed_program.minimize(loss, args.learning_rate)
  steps, rates = max(1, args.samples // args.batch_size), []
  with tf.train.MonitoredTrainingSession(config=configuration(args.threads)) as session:
    for repetition in range(args.repetitions + 1):
      start = time.perf_counter()
      for _ in range(steps if repetition else WARM_UP_STEPS):
        session.run([train, loss])
      if repetition:
        rates.append(steps * args.batch_size / (time.perf_counter() - start))
  return of_rates(rates)


def quality(args: argparse.Namespace, buckets: tuple[int, ...]) -> dict[str, object]:
  """One epoch in file order, then all of eval.csv in batches of the same size: batch norm uses each batch's statistics,
  in evaluation too."""
  train_set, eval_set = (
    seed_program.batches(os.path.join(args.csv, f'{split}.csv'), args.batch_size, 1, None)
    for split in ('train', 'eval')
  )
  kind = tf.data.get_output_types(train_set), tf.data.get_output_shapes(train_set)
  iterator = tf.data.Iterator.from_structure(*kind)
  features, label = iterator.get_next()
  probability = seed_program.network(features, buckets, args.interaction)
  train = seed_program.minimize(seed_program.binary_cross_entropy(label, probability), args.learning_rate)
  with tf.Session(config=configuration(args.threads)) as session:
    session.run(tf.global_variables_initializer())
    start = time.perf_counter()
    steps = len(run_all(session, iterator.make_initializer(train_set), train))
    seconds = time.perf_counter() - start
    pairs = run_all(session, iterator.make_initializer(eval_set), [label, probability])
  labels, probabilities = (np.concatenate([np.atleast_1d(part) for part in parts]) for parts in zip(*pairs))
  return {
    'auc': auc(labels, probabilities),
    'accuracy': float(np.mean((probabilities > 0.5) == (labels > 0.5))),
    'log_loss': log_loss(labels, probabilities),
    'train_seconds': round(seconds, 1),
    'steps': steps,
    'eval_rows': len(labels),
  }


def run_all(session: tf.Session, initializer: tf.Operation, fetches: object) -> list:
  """What `fetches` gives for each batch of a dataset."""
  session.run(initializer)
  out = []
  while True:
    try:
      out.append(session.run(fetches))
    except tf.errors.OutOfRangeError:
      return out


MODES = {'speed': speed, 'quality': quality}


def arguments(argv: list[str]) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = parser.add_argument
  add('--mode', choices=sorted(MODES), default='speed')
  add('--source', choices=('csv', 'memory'), default='csv', help='csv only: the seed reads nothing else')
  add('--csv', help='folder with train.csv, and eval.csv for quality')
  add('--buckets', type=int, default=10000, help='rows of every column; 0: the per-column sizes, 19,044,490 rows')
  add('--batch_size', type=int, default=512)
  add('--learning_rate', type=float, default=0.01)
  add('--interaction', choices=('cat', 'dot'), default='cat')
  add('--dtype', choices=('f32', 'bf16'), default='f32', help='f32 only')
  add('--seed', type=int, default=2021, help='of the initial values')
  add('--threads', type=int, default=0, help='0: TensorFlow chooses')
  add('--repetitions', type=int, default=7, help='speed: timed stretches')
  add('--samples', type=int, default=65536, help='speed: samples of a stretch')
  args = parser.parse_args(argv)
  check(args)
  return args


def check(args: argparse.Namespace) -> None:
  """Ends the program with one line where the flags cannot work."""
  if args.dtype != 'f32':
    raise SystemExit(f'error: --dtype {args.dtype}: community TensorFlow 1.15 trains this model in f32 only')
  if args.source != 'csv':
    raise SystemExit(f"error: --source {args.source}: the seed's program reads CSVs only; use --source csv")
  for name, least in (('batch_size', 2), ('repetitions', 1), ('samples', 1), ('threads', 0), ('buckets', 0)):
    if getattr(args, name) < least:
      raise SystemExit(f'error: --{name} {getattr(args, name)}: give {least} or more')
  if not args.csv:
    raise SystemExit('error: no data: give --csv FOLDER with train.csv')
  for split in ('train', 'eval') if args.mode == 'quality' else ('train',):
    if not os.path.isfile(os.path.join(args.csv, f'{split}.csv')):
      raise SystemExit(f'error: no {split}.csv in {args.csv}; see --csv')


def main(argv: list[str]) -> None:
  """Runs one mode and prints its line of JSON."""
  args = arguments(argv)
  buckets = sizes(args.buckets)
  tf.set_random_seed(args.seed)
  result = MODES[args.mode](args, buckets)
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
