"""The training loss."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def cross_entropy(
  logit: Float[Array, 'B'], label: Float[Array, 'B'], weight: Float[Array, 'B'], total: Float[Array, '']
) -> Float[Array, '']:
  """Sum of the weighted binary cross entropies from logits, divided by `total` (the weight of the whole batch)."""
  return jnp.sum(weight * (jax.nn.softplus(logit) - label * logit)) / total
