"""The DLRM: bottom MLP on the integers, interaction with the 26 vectors, top MLP, one logit.

Naumov et al. 2019, arXiv:1906.00091. The tables are not part of it: it takes vectors, so that their gradient is a true
gradient of what was looked up and never one of a table.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from dlrm_jax.model.interaction import INTERACTIONS
from dlrm_jax.model.layers import XLA, LayerKernels
from dlrm_jax.model.loss import cross_entropy
from dlrm_jax.model.mlp import MLP
from dlrm_jax.sharding import ALONE, Axis
from dlrm_jax.spec import ModelSpec


class DLRM(nn.Module):
  """In two halves, since only the first couples the examples of a batch (by its batch statistics)."""

  spec: ModelSpec
  kernels: LayerKernels = XLA
  axis: Axis = ALONE

  def setup(self) -> None:
    dtype = jnp.dtype(self.spec.dtype)
    self.bottom_mlp = MLP(self.spec.bottom_mlp, self.spec.batch_norm, dtype, self.kernels.layer, self.axis)
    self.top_mlp = MLP(self.spec.top_mlp, dtype=dtype, layer=self.kernels.layer)
    self.logit_kernel = self.param('logit_kernel', nn.initializers.glorot_uniform(), (self.spec.top_mlp[-1], 1))
    self.logit_bias = self.param('logit_bias', nn.initializers.zeros, ())

  def bottom(self, dense: Float[Array, 'B I'], weight: Float[Array, 'B'], train: bool) -> Float[Array, 'K B']:
    """The integers as one more vector per example, feature-major."""
    return self.bottom_mlp(dense.T, weight, train)

  def top(self, bottom: Float[Array, 'K B'], vectors: Float[Array, 'B F D']) -> Float[Array, 'B']:
    """Logits. The last layer is float32 whatever the dtype of the MLPs."""
    transpose = functools.partial(self.kernels.transpose, dtype=jnp.dtype(self.spec.dtype))
    z = INTERACTIONS[self.spec.interaction](bottom, vectors, transpose)
    h = self.top_mlp(z, jnp.ones(z.shape[1]), train=False)
    return self.logit_kernel[:, 0] @ h + self.logit_bias

  def loss(
    self,
    bottom: Float[Array, 'K B'],
    vectors: Float[Array, 'B F D'],
    label: Float[Array, 'B'],
    weight: Float[Array, 'B'],
    total: Float[Array, ''],
  ) -> Float[Array, '']:
    """The examples' `cross_entropy`, for `cat` in one kernel where there is one. To be differentiated."""
    if self.kernels.cat_loss is None or self.spec.interaction != 'cat':
      return cross_entropy(self.top(bottom, vectors), label, weight, total)
    params = self.variables['params']
    return self.kernels.cat_loss(jnp.dtype(self.spec.dtype), params, bottom, vectors, label, weight, total)

  def __call__(self, dense: Array, vectors: Array, weight: Array, train: bool) -> Float[Array, 'B']:
    """Logits of the examples."""
    return self.top(self.bottom(dense, weight, train), vectors)
