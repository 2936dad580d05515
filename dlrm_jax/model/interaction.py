"""How the bottom MLP's output and the 26 vectors meet. Feature-major: [features, B]."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


def cat(
  bottom: Float[Array, 'K B'], vectors: Float[Array, 'B F D'], transpose: Callable[[Array], Array] = jnp.transpose
) -> Float[Array, 'N B']:
  """All of them under each other: N = K + F * D, in the dtype that `transpose` gives."""
  columns = transpose(vectors.reshape(vectors.shape[0], -1))
  return jnp.concatenate([bottom.astype(columns.dtype), columns])


def dot(
  bottom: Float[Array, 'D B'], vectors: Float[Array, 'B F D'], transpose: Callable[[Array], Array] = jnp.transpose
) -> Float[Array, 'N B']:
  """The bottom output and the dot products of each two of the F + 1 vectors: N = D + F * (F + 1) / 2.

  Pairs (i, j) with j < i come in the order (1, 0), (2, 0), (2, 1), ...; vector 0 is the bottom output.
  """
  del transpose  # nothing here is only turned around
  features = jnp.concatenate([bottom.T[:, None], vectors], axis=1)
  products = jnp.einsum('bid,bjd->ijb', features, features)
  i, j = np.tril_indices(features.shape[1], k=-1)
  return jnp.concatenate([bottom, products[i, j]])


INTERACTIONS = {'cat': cat, 'dot': dot}
