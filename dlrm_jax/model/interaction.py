"""How the bottom MLP's output and the 26 vectors meet. Feature-major: [features, B]."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


def cat(bottom: Float[Array, 'K B'], vectors: Float[Array, 'B F D']) -> Float[Array, 'N B']:
  """All of them under each other: N = K + F * D."""
  return jnp.concatenate([bottom, vectors.reshape(vectors.shape[0], -1).T])


def dot(bottom: Float[Array, 'D B'], vectors: Float[Array, 'B F D']) -> Float[Array, 'N B']:
  """The bottom output and the dot products of each two of the F + 1 vectors: N = D + F * (F + 1) / 2.

  Pairs (i, j) with j < i come in the order (1, 0), (2, 0), (2, 1), ...; vector 0 is the bottom output.
  """
  features = jnp.concatenate([bottom.T[:, None], vectors], axis=1)
  products = jnp.einsum('bid,bjd->ijb', features, features)
  i, j = np.tril_indices(features.shape[1], k=-1)
  return jnp.concatenate([bottom, products[i, j]])


INTERACTIONS = {'cat': cat, 'dot': dot}
