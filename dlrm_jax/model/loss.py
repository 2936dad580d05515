"""The training loss."""

import jax
from jax import Array
from jaxtyping import Float

from dlrm_jax import sums


def cross_entropy(
  logit: Float[Array, 'B'], label: Float[Array, 'B'], weight: Float[Array, 'B'], total: Float[Array, '']
) -> Float[Array, '']:
  """Mean of the weighted binary cross entropies from logits; `total` is the weight of the whole batch.

  Each is divided by it, not their sum: of several devices each has a part of that.
  """
  return sums.of_examples((weight / total * (jax.nn.softplus(logit) - label * logit))[None])[0]
