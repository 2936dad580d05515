"""Datasets of (label f32[B], dense f32[B, 13], row i32[B, 26]): from the CSV itself, or from arrays in memory."""

from pathlib import Path

import numpy as np
import tensorflow as tf
from shared import COLUMNS, DENSE, check_buckets, synthetic

PREFETCH = 4
READ_BYTES = 4 << 20
# A missing integer is 0 (as after the transform), a missing category the id of one space, as in the seed's program.
DEFAULTS = [[0.0]] * (1 + DENSE) + [[' ']] * COLUMNS


def offsets(buckets: tuple[int, ...]) -> np.ndarray:
  """The first row of each column in the merged table, i64[26]."""
  return np.cumsum(buckets) - buckets


class Csv:
  """`train.csv` and `eval.csv` of a folder: no header, label, I1..I13, C1..C26, fields may be empty."""

  def __init__(self, folder: Path, buckets: tuple[int, ...], threads: int):
    self.folder, self.buckets, self.threads = folder, buckets, threads

  def batches(self, split: str, size: int, repeat: bool) -> tf.data.Dataset:
    """Batches in file order: one pass with the smaller last batch, or full batches from pass after pass."""
    lines = tf.data.TextLineDataset(str(self.folder / f'{split}.csv'), buffer_size=READ_BYTES)
    if repeat:
      lines = lines.repeat()
    lines = lines.batch(size, drop_remainder=repeat)
    return lines.map(self.decode, num_parallel_calls=self.threads).prefetch(PREFETCH)

  def decode(self, lines: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A batch of lines at once: sign(x) log1p|x| of the integers, Fingerprint64 mod buckets of the categories."""
    fields = tf.io.decode_csv(lines, DEFAULTS)
    integers = tf.stack(fields[1 : 1 + DENSE], 1)
    rows = [
      tf.cast(tf.strings.to_hash_bucket_fast(field, buckets), tf.int32) + int(offset)
      for field, buckets, offset in zip(fields[1 + DENSE :], self.buckets, offsets(self.buckets), strict=True)
    ]
    return fields[0], tf.sign(integers) * tf.math.log1p(tf.abs(integers)), tf.stack(rows, 1)


class Memory:
  """Arrays in memory, ids hashed and offset beforehand: `--data` as the PyTorch twin has it, or synthetic ones."""

  def __init__(self, folder: Path | None, buckets: tuple[int, ...], pool: int, seed: int):
    self.folder, self.buckets, self.pool, self.seed = folder, buckets, pool, seed

  def batches(self, split: str, size: int, repeat: bool) -> tf.data.Dataset:
    """As `Csv.batches`; repeated ones come from the first `pool` rows."""
    label, dense, bucket = self.arrays(split, self.pool if repeat else None)
    with tf.device('CPU'):
      arrays = [tf.constant(a) for a in (label, dense, (bucket + offsets(self.buckets)).astype(np.int32))]
    rows = len(label)
    starts = range(0, rows - size + 1 if repeat else rows, size)
    if not starts:
      raise SystemExit(f'error: {rows} rows in memory, fewer than --batch_size {size}; raise --pool')
    dataset = tf.data.Dataset.range(starts.start, starts.stop, starts.step)
    if repeat:
      # Static shapes, as batch(drop_remainder=True) gives.
      return dataset.repeat().map(lambda s: [tf.ensure_shape(a[s : s + size], [size, *a.shape[1:]]) for a in arrays])
    return dataset.map(lambda s: [a[s : s + size] for a in arrays])

  def arrays(self, split: str, rows: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """label f32[N], dense f32[N, 13], bucket u32[N, 26]; at most `rows` of them."""
    if not self.folder:
      return synthetic(self.pool, self.buckets, self.seed)
    names = ('label', 'dense', 'bucket')
    label, dense, bucket = (np.load(self.folder / f'{split}_{n}.npy', mmap_mode='r')[:rows] for n in names)
    check_buckets(f'{self.folder}: {split}', bucket, self.buckets)
    return np.array(label), np.array(dense), np.array(bucket)
