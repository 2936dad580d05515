"""AdamAsync: Adam with its moments in the form that cannot go negative, and a mode without bias correction for rows."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.optim.adam import AdamState, bias_correction, check_betas
from dlrm_jax.optim.rules import Rule, WithRule
from dlrm_jax.optim.schedules import LearningRate, rate_at


def adam_async(
  learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, rmsprop: bool = False
) -> optax.GradientTransformation:
  """AdamAsync: m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v)+eps).

  With `rmsprop`, which the source has for table rows only: v = b2 v + (1-b2) g^2; m = b1 m + lr g / sqrt(v+eps);
  w -= m. Epsilon is inside the root there, and the first steps are large: lr / sqrt(1-b2), 32 lr by default.

  Args:
    learning_rate: a number, or a schedule of the count of updates done.
    b1: decay of the running mean, in [0, 1).
    b2: decay of the running mean of squares, in [0, 1).
    eps: see the formulas.
    rmsprop: the mode.

  Source: DeepRec, tensorflow/python/training/adam_async.py at commit 20a3e06f.
  """
  check_betas('adamasync', b1, b2)

  def init(params: Any) -> AdamState:
    # Two trees of zeros: under donation m and v must not be one buffer.
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return AdamState(count=jnp.zeros([], jnp.int32), m=m, v=v)

  def rate(state: AdamState) -> float | jax.Array:
    plain = rate_at(learning_rate, state.count)
    return plain if rmsprop else plain * bias_correction(optax.safe_increment(state.count), b1, b2)

  def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
    del params
    alpha = rate(state)
    v = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, grads, state.v)
    if rmsprop:
      m = jax.tree.map(lambda g, m, v: b1 * m + alpha * g / jnp.sqrt(v + eps), grads, state.m, v)
      updates = jax.tree.map(jnp.negative, m)
    else:
      m = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.m)
      updates = jax.tree.map(lambda m, v: -alpha.astype(m.dtype) * m / (jnp.sqrt(v) + eps), m, v)
    return updates, AdamState(optax.safe_increment(state.count), m, v)

  name = 'rmsprop' if rmsprop else 'adamasync'
  return WithRule(init, update, Rule(name, lambda state: (rate(state), b1, 1 - b1, b2, 1 - b2, eps)))
