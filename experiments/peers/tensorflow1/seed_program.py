"""The seed's program on community TensorFlow 1.15 (its `--tf` path): input, network, loss and optimizer.

Written anew from a description of that program; the faults that it describes are kept (README.md).
"""

from __future__ import annotations

import tensorflow as tf
from shared import DIM

LABEL = 'clicked'
INTEGERS = [f'I{i}' for i in range(1, 14)]
CATEGORIES = [f'C{i}' for i in range(1, 27)]
BOTTOM, TOP = (512, 256, 64, DIM), (512, 256)
SHUFFLE_LINES, DECODE_CALLS, PREFETCH_BATCHES = 20000, 28, 2
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def decode(lines: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
  """Features by name and label i32[B] of a batch of lines; a missing integer is 0, a missing category one space."""
  defaults = [[0]] + [[0.0]] * len(INTEGERS) + [[' ']] * len(CATEGORIES)
  fields = tf.io.decode_csv(lines, record_defaults=defaults)
  features = dict(zip([LABEL, *INTEGERS, *CATEGORIES], fields))
  return features, features.pop(LABEL)


def batches(path: str, batch_size: int, epochs: int | None, shuffle_seed: int | None) -> tf.data.Dataset:
  """Dataset of `decode`d batches. epochs: None for no end. shuffle_seed: None keeps the order of the file."""
  lines = tf.data.TextLineDataset(path)
  if shuffle_seed is not None:
    lines = lines.shuffle(SHUFFLE_LINES, seed=shuffle_seed)
  lines = lines.repeat(epochs).batch(batch_size)
  return lines.map(decode, num_parallel_calls=DECODE_CALLS).prefetch(PREFETCH_BATCHES)


def bottom_mlp(features: dict[str, tf.Tensor]) -> tf.Tensor:
  """Raw integers to [B, 16]: dense, ReLU, then batch norm with the batch's own statistics, in evaluation too."""
  with tf.variable_scope('dense_input'):
    x = tf.feature_column.input_layer(features, [tf.feature_column.numeric_column(name) for name in INTEGERS])
  with tf.variable_scope('bottom_mlp'):
    for number, units in enumerate(BOTTOM):
      x = tf.layers.dense(x, units, activation=tf.nn.relu, name=f'layer_{number}')
      x = tf.layers.batch_normalization(x, training=True, name=f'norm_{number}')
  return x


def embed(features: dict[str, tf.Tensor], buckets: tuple[int, ...]) -> tuple[tf.Tensor, list[tf.Tensor]]:
  """All vectors [B, 26 * 16] in TensorFlow's order of names, and a list of [B, 16] in the order of the columns."""
  columns = [
    tf.feature_column.embedding_column(
      tf.feature_column.categorical_column_with_hash_bucket(name, size), dimension=DIM, combiner='mean'
    )
    for name, size in zip(CATEGORIES, buckets)
  ]
  vectors = {}
  with tf.variable_scope('sparse_input'):
    joined = tf.feature_column.input_layer(features, columns, cols_to_output_tensors=vectors)
  return joined, [vectors[column] for column in columns]


def interact(x: tf.Tensor, joined: tf.Tensor, vectors: list[tf.Tensor], interaction: str) -> tf.Tensor:
  """[B, 432] (cat) or [B, 367] (dot: the strictly lower triangle of the products of 27 vectors, after x)."""
  if interaction == 'cat':
    return tf.concat([x, joined], 1)
  stacked = tf.stack([x, *vectors], 1)
  products = tf.matmul(stacked, stacked, transpose_b=True)
  size = len(vectors) + 1
  keep = tf.constant([[column < row for column in range(size)] for row in range(size)])
  kept = tf.boolean_mask(products, keep, axis=1)
  return tf.concat([x, tf.reshape(kept, [-1, size * (size - 1) // 2])], 1)


def top_mlp(z: tf.Tensor) -> tf.Tensor:
  """Probability [B, 1]. The seed's fault: each layer reads z, not the layer before, so that only the last one counts;
  the 512 layer is computed by nobody and gets no gradient."""
  with tf.variable_scope('top_mlp'):
    for number, units in enumerate(TOP):
      x = tf.layers.dense(z, units, activation=tf.nn.relu, name=f'layer_{number}')
  with tf.variable_scope('logits'):
    return tf.sigmoid(tf.layers.dense(x, 1))


def network(features: dict[str, tf.Tensor], buckets: tuple[int, ...], interaction: str) -> tf.Tensor:
  """Probability [B]."""
  joined, vectors = embed(features, buckets)
  z = interact(bottom_mlp(features), joined, vectors, interaction)
  return tf.squeeze(top_mlp(z))


def binary_cross_entropy(label: tf.Tensor, probability: tf.Tensor) -> tf.Tensor:
  """Mean over the batch, of probabilities rather than logits: Keras does not see the sigmoid behind the squeeze."""
  return tf.keras.losses.BinaryCrossentropy()(tf.cast(label, tf.float32), probability)


def minimize(loss: tf.Tensor, learning_rate: float) -> tf.Operation:
  """Train operation: stock Adam, which moves every row of every table in every step."""
  optimizer = tf.train.AdamOptimizer(learning_rate, BETA1, BETA2, EPSILON)
  return optimizer.minimize(loss, global_step=tf.train.get_or_create_global_step())
