"""The training loss."""

import jax
from jax import Array
from jaxtyping import Float

from dlrm_jax import sums


def cross_entropy(
  logit: Float[Array, 'B'], label: Float[Array, 'B'], weight: Float[Array, 'B'], total: Float[Array, '']
) -> Float[Array, '']:
  """Sum of the weighted binary cross entropies from logits, divided by `total` (the weight of the whole batch)."""
  losses = weight * (jax.nn.softplus(logit) - label * logit)
  return sums.of_examples(losses[None])[0] / total
