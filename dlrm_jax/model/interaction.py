"""How the bottom MLP's output and the 26 vectors meet. Feature-major: [features, B]."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dlrm_jax.model.layers import Transpose, xla_transpose


def cat(
  bottom: Float[Array, 'K B'],
  vectors: Float[Array, 'B F D'],
  transpose: Transpose = xla_transpose,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, 'N B']:
  """All of them under each other: N = K + F * D. `dtype` is that of the products to come."""
  columns = transpose(vectors.reshape(vectors.shape[0], -1), dtype)
  return jnp.concatenate([bottom.astype(columns.dtype), columns])


def dot(
  bottom: Float[Array, 'D B'],
  vectors: Float[Array, 'B F D'],
  transpose: Transpose = xla_transpose,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, 'N B']:
  """The bottom output and the dot products of each two of the F + 1 vectors: N = D + F * (F + 1) / 2.

  Pairs (i, j) with j < i come in the order (1, 0), (2, 0), (2, 1), ...; vector 0 is the bottom output.
  """
  del transpose, dtype  # nothing here is only turned around
  features = jnp.concatenate([bottom.T[:, None], vectors], axis=1)
  products = jnp.einsum('bid,bjd->ijb', features, features)
  i, j = np.tril_indices(features.shape[1], k=-1)
  return jnp.concatenate([bottom, products[i, j]])


INTERACTIONS = {'cat': cat, 'dot': dot}
