"""A multi-layer perceptron on feature-major activations [features, B], with batch norm folded into the next layer.

Feature-major, because then no product of the forward or backward pass needs an activation transposed, and batch
statistics reduce over the contiguous axis. Folded: with h' = h * scale + shift, W^T h' + b = (scale W)^T h + (W^T shift
+ b), so a normalised activation is never written to memory. Both are the same numbers up to rounding.

With several devices, a kernel's gradient is summed over them before it goes on to batch norm. So gradients have the
same bits on any number of devices on which the sums over examples have.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dlrm_jax import sums
from dlrm_jax.model.layers import XLA, LayerKernels, Moments
from dlrm_jax.sharding import ALONE, Axis

BATCH_NORM_MOMENTUM = 0.99
BATCH_NORM_EPSILON = 1e-3


class Activations(NamedTuple):
  """Of a last layer: h * scale + shift, or h alone."""

  h: Float[Array, 'N B']
  scale_shift: tuple[Float[Array, 'N'], Float[Array, 'N']] | None = None

  def values(self, axis: Axis = ALONE) -> Float[Array, 'N B']:
    """The activations."""
    return scaled(axis, self.h, *self.scale_shift) if self.scale_shift else self.h


class MLP(nn.Module):
  """Dense, ReLU and, if asked for, batch norm, once for each of `sizes`."""

  sizes: tuple[int, ...]
  batch_norm: bool = False
  dtype: DTypeLike = jnp.float32
  kernels: LayerKernels = XLA
  axis: Axis = ALONE  # the devices whose examples make up the batch
  reduce_dtype: str = 'float32'  # of gradients on their way between devices

  @nn.compact
  def __call__(self, h: Float[Array, 'K B'], weight: Float[Array, 'B'], train: bool) -> Activations:
    """`weight` is the share of each example in the batch statistics."""
    scale, shift = None, None
    for layer, size in enumerate(self.sizes):
      kernel = self.param(f'kernel_{layer}', nn.initializers.glorot_uniform(), (h.shape[0], size))
      bias = self.param(f'bias_{layer}', nn.initializers.zeros, (size,))
      if scale is not None:
        kernel, bias = self.kernels.fold(kernel, bias, scale, shift)
      kernel, bias = self.axis.to_each((kernel, bias), self.reduce_dtype)
      h, moments = self.kernels.layer(kernel, bias, h, weight, self.dtype, self.batch_norm)
      if self.batch_norm:
        scale, shift = self._batch_norm(layer, moments, weight, train)
    return Activations(h, None if scale is None else (scale, shift))

  def _batch_norm(self, layer: int, moments: Moments, weight: Array, train: bool) -> tuple[Array, Array]:
    """The scale and shift [features] that normalise: by the batch in training, by the running statistics else."""
    size = moments[0].shape[0]
    gamma = self.param(f'gamma_{layer}', nn.initializers.ones, (size,))
    beta = self.param(f'beta_{layer}', nn.initializers.zeros, (size,))
    running = self.variable('batch_stats', f'running_{layer}', _no_statistics, size)
    if train:
      moments, total = self.axis.sum_flat((moments, weight.sum()))
      mean, variance = batch_statistics(moments, total)
      if not self.is_initializing():
        running.value = update_running(running.value, mean, variance, total)
    else:
      mean, variance = debiased(running.value)
    scale = gamma * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON)
    return scale, beta - mean * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled(
  axis: Axis, h: Float[Array, 'N B'], scale: Float[Array, 'N'], shift: Float[Array, 'N']
) -> Float[Array, 'N B']:
  """h * scale + shift, whose gradients are `sums.of_examples`."""
  return h * scale[:, None] + shift[:, None]


def _scaled_backward(axis: Axis, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
  h, scale = saved
  of_h = (gradient * scale[:, None]).astype(h.dtype)
  return of_h, sums.of_examples(axis.fence(gradient * h)), sums.of_examples(gradient)


scaled.defvjp(lambda axis, h, scale, shift: (scaled(axis, h, scale, shift), (h, scale)), _scaled_backward)


def batch_statistics(moments: Moments, total: Float[Array, '']) -> tuple[Float[Array, 'N'], Float[Array, 'N']]:
  """Mean and (biased) variance of each feature over the examples, whose weights sum to `total`."""
  # Of divisions by one number XLA makes this itself, but not in all programs, and all are to give the same bits.
  share = 1 / jnp.maximum(total, 1)
  mean, square = (moment * share for moment in moments)
  return mean, jnp.maximum(square - jnp.square(mean), 0)


Running = dict[str, Array]


def _no_statistics(size: int) -> Running:
  return {'mean': jnp.zeros(size), 'variance': jnp.zeros(size), 'mass': jnp.zeros(())}


def update_running(running: Running, mean: Array, variance: Array, total: Array) -> Running:
  """Exponential averages from zero; `mass` is the sum of their weights. A batch of padding changes nothing."""
  rate = jnp.where(total > 0, 1 - BATCH_NORM_MOMENTUM, 0)
  new = {'mean': mean, 'variance': variance, 'mass': jnp.ones(())}
  return jax.tree.map(lambda old, value: old + rate * (value - old), running, new)


def debiased(running: Running) -> tuple[Array, Array]:
  """Running mean and variance as a proper average of what was seen, so that a short run evaluates well; else (0, 1)."""
  seen = running['mass'] > 0
  share = 1 / jnp.where(seen, running['mass'], 1)
  return running['mean'] * share, jnp.where(seen, running['variance'] * share, 1)
