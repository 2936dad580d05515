"""The DLRM: bottom MLP on the integers, interaction with the 26 vectors, top MLP, one logit.

Naumov et al. 2019, arXiv:1906.00091. The tables are not part of it: it takes vectors, so that their gradient is a true
gradient of what was looked up and never one of a table.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from dlrm_jax import sums
from dlrm_jax.model.interaction import INTERACTIONS
from dlrm_jax.model.layers import XLA, LayerKernels
from dlrm_jax.model.loss import cross_entropy
from dlrm_jax.model.mlp import MLP, Activations
from dlrm_jax.sharding import ALONE, Axis
from dlrm_jax.spec import ModelSpec


class DLRM(nn.Module):
  """In two halves, since only the first couples the examples of a batch (by its batch statistics)."""

  spec: ModelSpec
  kernels: LayerKernels = XLA
  axis: Axis = ALONE

  def setup(self) -> None:
    dtype = jnp.dtype(self.spec.dtype)
    self.bottom_mlp = MLP(
      self.spec.bottom_mlp, self.spec.batch_norm, dtype, self.kernels, self.axis, self.spec.reduce_dtype
    )
    self.top_mlp = MLP(self.spec.top_mlp, dtype=dtype, kernels=self.kernels)
    self.logit_kernel = self.param('logit_kernel', nn.initializers.glorot_uniform(), (self.spec.top_mlp[-1], 1))
    self.logit_bias = self.param('logit_bias', nn.initializers.zeros, ())

  def bottom(self, dense: Float[Array, 'B I'], weight: Float[Array, 'B'], train: bool) -> Activations:
    """The integers as one more vector per example, feature-major."""
    return self.bottom_mlp(dense.T, weight, train)

  def top(self, bottom: Activations, vectors: Float[Array, 'B F D']) -> Float[Array, 'B']:
    """Logits. The last layer is float32 whatever the dtype of the MLPs."""
    transpose = functools.partial(self.kernels.transpose, dtype=jnp.dtype(self.spec.dtype))
    z = INTERACTIONS[self.spec.interaction](bottom.values(self.axis), vectors, transpose)
    h = self.top_mlp(z, jnp.ones(z.shape[1]), train=False).values()
    return logits(self.axis, self.logit_kernel[:, 0], self.logit_bias, h)

  def loss(
    self,
    bottom: Activations,
    vectors: Float[Array, 'B F D'],
    label: Float[Array, 'B'],
    weight: Float[Array, 'B'],
    total: Float[Array, ''],
  ) -> Float[Array, '']:
    """The examples' `cross_entropy`, for `cat` in one kernel where there is one. To be differentiated."""
    if self.kernels.cat_loss is None or self.spec.interaction != 'cat':
      return cross_entropy(self.top(bottom, vectors), label, weight, total)
    inputs = bottom.values(self.axis), vectors, label, weight, total
    return self.kernels.cat_loss(jnp.dtype(self.spec.dtype), self.variables['params'], *inputs)

  def __call__(self, dense: Array, vectors: Array, weight: Array, train: bool) -> Float[Array, 'B']:
    """Logits of the examples."""
    return self.top(self.bottom(dense, weight, train), vectors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits(axis: Axis, kernel: Float[Array, 'N'], bias: Float[Array, ''], h: Float[Array, 'N B']) -> Float[Array, 'B']:
  """kernel h + bias, whose gradients by both are `sums.of_examples`."""
  return kernel @ h + bias


def _logits_backward(axis: Axis, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
  kernel, h = saved
  of_kernel = sums.of_examples(axis.fence(gradient[None] * h))
  return of_kernel, sums.of_examples(gradient[None])[0], (kernel[:, None] * gradient[None]).astype(h.dtype)


logits.defvjp(lambda axis, kernel, bias, h: (logits(axis, kernel, bias, h), (kernel, h)), _logits_backward)
