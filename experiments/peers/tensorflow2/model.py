"""The DLRM of this project in plain TensorFlow 2 operations, its dense Adam, and the merged table with lazy Adam."""

import itertools

import numpy as np
import tensorflow as tf
from shared import COLUMNS, DENSE, DIM

BOTTOM, TOP = (512, 256, 64, DIM), (512, 256)
MOMENTUM, NORM_EPSILON = 0.99, 1e-3
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
INITIAL_ROWS = 1 << 20  # rows filled at a time
# Strictly lower triangle of the 27 x 27 products, row by row.
PAIRS = np.ravel_multi_index(np.tril_indices(COLUMNS + 1, -1), (COLUMNS + 1, COLUMNS + 1))


class Dlrm(tf.Module):
  """Bottom MLP 512-256-64-16 (dense, ReLU, batch norm), interaction, top MLP 512-256-1.

  dtype: of the MLPs' activations and products; weights, batch norm's sums, the last layer and the loss are f32.
  """

  def __init__(self, interaction: str, dtype: tf.DType, generator: tf.random.Generator):
    super().__init__()
    self.interaction, self.dtype = interaction, dtype
    width = DIM * (COLUMNS + 1) if interaction == 'cat' else DIM + len(PAIRS)
    self.bottom = layers((DENSE, *BOTTOM), generator)
    self.top = layers((width, *TOP, 1), generator)
    self.norm = [(tf.Variable(tf.ones(n)), tf.Variable(tf.zeros(n))) for n in BOTTOM]
    self.running = [[tf.Variable(tf.zeros(n), trainable=False) for _ in range(2)] for n in BOTTOM]

  def __call__(self, dense: tf.Tensor, vectors: tf.Tensor, steps: tf.Tensor | None = None) -> tf.Tensor:
    """Logits f32[B] of dense f32[B, 13], vectors f32[B, 26, 16]. steps: trained so far, in evaluation only."""
    x = tf.cast(dense, self.dtype)
    for layer, norm, running in zip(self.bottom, self.norm, self.running, strict=True):
      x = self.batch_norm(tf.nn.relu(self.affine(x, layer)), norm, running, steps)
    x = self.interact(x, tf.cast(vectors, self.dtype))
    for layer in self.top[:-1]:
      x = tf.nn.relu(self.affine(x, layer))
    kernel, bias = self.top[-1]
    return tf.squeeze(tf.cast(x, tf.float32) @ kernel + bias, 1)

  def affine(self, x: tf.Tensor, layer: tuple[tf.Variable, tf.Variable]) -> tf.Tensor:
    """x W + b in the MLPs' dtype; TensorFlow's own oneDNN pass fuses the bias in."""
    kernel, bias = (tf.cast(variable, self.dtype) for variable in layer)
    return tf.matmul(x, kernel) + bias

  def batch_norm(self, x: tf.Tensor, norm, running, steps: tf.Tensor | None) -> tf.Tensor:
    """With the batch's own statistics, or with the running ones, debiased as if averaged from the first step on."""
    gamma, beta = norm
    if steps is None:
      # The fused kernel of images: one pass each way, f32 sums. Its variance for the running average is unbiased.
      rows, width = tf.cast(tf.shape(x)[0], tf.float32), x.shape[1]
      y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
        tf.reshape(x, [-1, 1, 1, width]), gamma, beta, epsilon=NORM_EPSILON, is_training=True
      )
      biased = variance * (rows - 1) / rows
      for average, value in zip(running, (mean, biased), strict=True):
        average.assign_sub((1 - MOMENTUM) * (average - tf.stop_gradient(value)))
      return tf.reshape(y, [-1, width])
    debias = 1 - MOMENTUM ** tf.cast(steps, tf.float32)
    mean, variance = (average / debias for average in running)
    scale = gamma * tf.math.rsqrt(variance + NORM_EPSILON)
    return tf.cast(tf.cast(x, tf.float32) * scale + (beta - mean * scale), self.dtype)

  def interact(self, x: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
    """[B, 16] and [B, 26, 16] to [B, 432] (cat) or [B, 367] (dot)."""
    if self.interaction == 'cat':
      return tf.concat([x, tf.reshape(vectors, [-1, COLUMNS * DIM])], 1)
    both = tf.concat([x[:, None], vectors], 1)
    products = tf.reshape(tf.matmul(both, both, transpose_b=True), [-1, (COLUMNS + 1) ** 2])
    return tf.concat([x, tf.gather(products, PAIRS, axis=1)], 1)


def layers(widths: tuple[int, ...], generator: tf.random.Generator) -> list[tuple[tf.Variable, tf.Variable]]:
  """Kernel (Glorot uniform) and bias (0) of each layer."""
  out = []
  for fan_in, fan_out in itertools.pairwise(widths):
    limit = (6 / (fan_in + fan_out)) ** 0.5
    kernel = generator.uniform([fan_in, fan_out], -limit, limit)
    out.append((tf.Variable(kernel), tf.Variable(tf.zeros(fan_out))))
  return out


class Adam(tf.Module):
  """Adam of the dense parameters by TensorFlow's fused kernel; holds the powers of beta, which the table uses too."""

  def __init__(self, parameters: tuple[tf.Variable, ...], learning_rate: float):
    super().__init__()
    self.parameters, self.rate = parameters, learning_rate
    self.slots = [[tf.Variable(tf.zeros_like(p), trainable=False) for _ in range(2)] for p in parameters]
    self.powers = [tf.Variable(beta, trainable=False) for beta in (BETA1, BETA2)]

  def apply(self, gradients: list[tf.Tensor]) -> None:
    """One update of all parameters."""
    power1, power2 = (power.read_value() for power in self.powers)
    for parameter, (m, v), gradient in zip(self.parameters, self.slots, gradients, strict=True):
      tf.raw_ops.ResourceApplyAdam(
        var=parameter.handle,
        m=m.handle,
        v=v.handle,
        beta1_power=power1,
        beta2_power=power2,
        lr=self.rate,
        beta1=BETA1,
        beta2=BETA2,
        epsilon=EPSILON,
        grad=gradient,
      )

  def advance(self) -> None:
    """Ends the step: the powers of beta grow, once for everything."""
    for power, beta in zip(self.powers, (BETA1, BETA2), strict=True):
      power.assign(power * beta)

  def alpha(self) -> tf.Tensor:
    """The learning rate with both corrections."""
    return self.rate * tf.sqrt(1 - self.powers[1]) / (1 - self.powers[0])


class Table(tf.Module):
  """All columns in one variable [rows, 48]: a row's value and its two moments side by side, so that a step gathers and
  scatters once. Only rows of the batch are touched (lazy Adam)."""

  def __init__(self, rows: int, generator: tf.random.Generator):
    super().__init__()
    self.packed = tf.Variable(lambda: tf.zeros([rows, 3 * DIM]), trainable=False, shape=[rows, 3 * DIM])
    for start in range(0, rows, INITIAL_ROWS):
      index = tf.range(start, min(rows, start + INITIAL_ROWS))
      value = generator.truncated_normal([len(index), DIM], stddev=DIM**-0.5)
      self.scatter(index, tf.pad(value, [[0, 0], [0, 2 * DIM]]))

  def scatter(self, index: tf.Tensor, packed: tf.Tensor) -> None:
    """Writes distinct rows."""
    tf.raw_ops.ResourceScatterUpdate(resource=self.packed.handle, indices=index, updates=packed)

  def gather(self, index: tf.Tensor) -> tf.Tensor:
    """Rows with their moments, [..., 48]."""
    return tf.raw_ops.ResourceGather(resource=self.packed.handle, indices=index, dtype=tf.float32)


class Trainer(tf.Module):
  """Model, table and both optimizers; `train` and `predict` are traced into graphs by their callers."""

  def __init__(self, rows: int, interaction: str, bf16: bool, learning_rate: float, seed: int):
    super().__init__()
    generator = tf.random.Generator.from_seed(seed)
    self.model = Dlrm(interaction, tf.bfloat16 if bf16 else tf.float32, generator)
    self.adam = Adam(self.model.trainable_variables, learning_rate)
    self.table = Table(rows, generator)
    self.steps = tf.Variable(0, trainable=False)

  def train(self, label: tf.Tensor, dense: tf.Tensor, row: tf.Tensor) -> None:
    """One step on label f32[B], dense f32[B, 13], row i32[B, 26]."""
    row, place = tf.unique(tf.reshape(row, [-1]))
    value, m, v = tf.split(self.table.gather(row), 3, 1)
    vectors = tf.reshape(tf.gather(value, place), [-1, COLUMNS, DIM])
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch([vectors, *self.adam.parameters])
      logit = self.model(dense, vectors)
      loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(label, logit))
    gradient, *gradients = tape.gradient(loss, [vectors, *self.adam.parameters])
    gradient = tf.math.unsorted_segment_sum(tf.reshape(gradient, [-1, DIM]), place, tf.size(row))
    m += (1 - BETA1) * (gradient - m)
    v += (1 - BETA2) * (tf.square(gradient) - v)
    value -= self.adam.alpha() * m / (tf.sqrt(v) + EPSILON)
    self.table.scatter(row, tf.concat([value, m, v], 1))
    self.adam.apply(gradients)
    self.adam.advance()
    self.steps.assign_add(1)

  def predict(self, dense: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """Logits f32[B] with the running statistics of batch norm."""
    return self.model(dense, self.table.gather(row)[..., :DIM], self.steps)
