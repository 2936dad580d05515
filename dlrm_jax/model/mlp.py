"""A multi-layer perceptron on feature-major activations [features, B], with batch norm folded into the next layer.

Feature-major, because then no product of the forward or backward pass needs an activation transposed, and batch
statistics reduce over the contiguous axis. Folded: with h' = h * scale + shift, W^T h' + b = (scale W)^T h + (W^T shift
+ b), so a normalised activation is never written to memory. Both are the same numbers up to rounding.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

BATCH_NORM_MOMENTUM = 0.99
BATCH_NORM_EPSILON = 1e-3


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(kernel: Float[Array, 'K N'], h: Float[Array, 'K B'], dtype: DTypeLike) -> Float[Array, 'N B']:
  """kernel^T h with operands rounded to `dtype`, in the forward and the backward pass, and sums in float32."""
  return _matmul_forward(kernel, h, dtype)[0]


def _matmul_forward(kernel: Array, h: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
  kernel, h = kernel.astype(dtype), h.astype(dtype)
  if kernel.dtype == jnp.float32:
    return _contract(kernel.T, 1, h, 0), (kernel, h)
  # XLA:CPU folds a transpose into the product, and its bfloat16 units have no such form: 3x slower. It folds none that
  # gets another row, so the product has one row too many.
  extra = jnp.zeros((1, kernel.shape[0]), kernel.dtype)
  return _contract(jnp.concatenate([kernel.T, extra]), 1, h, 0)[:-1], (kernel, h)


def _matmul_backward(dtype: DTypeLike, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  kernel, h = operands
  gradient = gradient.astype(dtype)
  return _contract(h, 1, gradient, 1), _contract(kernel, 1, gradient, 0)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _contract(a: Array, axis_a: int, b: Array, axis_b: int) -> Array:
  # float32 accumulation is also what makes XLA:CPU choose the processor's bfloat16 units.
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


class MLP(nn.Module):
  """Dense, ReLU and, if asked for, batch norm, once for each of `sizes`."""

  sizes: tuple[int, ...]
  batch_norm: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, h: Float[Array, 'K B'], weight: Float[Array, 'B'], train: bool) -> Float[Array, 'N B']:
    """Activations of the last layer. `weight` is the share of each example in the batch statistics."""
    scale, shift = None, None
    for layer, size in enumerate(self.sizes):
      kernel = self.param(f'kernel_{layer}', nn.initializers.glorot_uniform(), (h.shape[0], size))
      bias = self.param(f'bias_{layer}', nn.initializers.zeros, (size,))
      if scale is not None:
        kernel, bias = scale[:, None] * kernel, bias + shift @ kernel
      h = nn.relu(matmul(kernel, h, self.dtype) + bias[:, None])
      if self.batch_norm:
        scale, shift = self._batch_norm(layer, h, weight, train)
    return h if scale is None else h * scale[:, None] + shift[:, None]

  def _batch_norm(self, layer: int, h: Array, weight: Array, train: bool) -> tuple[Array, Array]:
    """The scale and shift [features] that normalise `h`: by the batch in training, by the running statistics else."""
    size = h.shape[0]
    gamma = self.param(f'gamma_{layer}', nn.initializers.ones, (size,))
    beta = self.param(f'beta_{layer}', nn.initializers.zeros, (size,))
    running = self.variable('batch_stats', f'running_{layer}', _no_statistics, size)
    if train:
      mean, variance = batch_statistics(h, weight)
      if not self.is_initializing():
        running.value = update_running(running.value, mean, variance, weight)
    else:
      mean, variance = debiased(running.value)
    scale = gamma * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON)
    return scale, beta - mean * scale


def batch_statistics(h: Float[Array, 'N B'], weight: Float[Array, 'B']) -> tuple[Float[Array, 'N'], Float[Array, 'N']]:
  """Mean and (biased) variance of each feature over the examples, weighted."""
  total = jnp.maximum(weight.sum(), 1)
  mean = (h * weight[None]).sum(axis=1) / total
  variance = (jnp.square(h) * weight[None]).sum(axis=1) / total - jnp.square(mean)
  return mean, jnp.maximum(variance, 0)


Running = dict[str, Array]


def _no_statistics(size: int) -> Running:
  return {'mean': jnp.zeros(size), 'variance': jnp.zeros(size), 'mass': jnp.zeros(())}


def update_running(running: Running, mean: Array, variance: Array, weight: Array) -> Running:
  """Exponential averages from zero; `mass` is the sum of their weights. A batch of padding changes nothing."""
  rate = jnp.where(weight.sum() > 0, 1 - BATCH_NORM_MOMENTUM, 0)
  new = {'mean': mean, 'variance': variance, 'mass': jnp.ones(())}
  return jax.tree.map(lambda old, value: old + rate * (value - old), running, new)


def debiased(running: Running) -> tuple[Array, Array]:
  """Running mean and variance as a proper average of what was seen, so that a short run evaluates well; else (0, 1)."""
  seen = running['mass'] > 0
  mass = jnp.where(seen, running['mass'], 1)
  return running['mean'] / mass, jnp.where(seen, running['variance'] / mass, 1)
