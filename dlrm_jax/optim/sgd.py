"""Gradient descent: w -= lr g."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.optim.rules import Rule, WithRule
from dlrm_jax.optim.schedules import LearningRate, rate_at


class SgdState(NamedTuple):
  """What gradient descent remembers."""

  count: jax.Array  # i32[], updates done


def sgd(learning_rate: LearningRate) -> optax.GradientTransformation:
  """Plain gradient descent, TensorFlow's GradientDescentOptimizer."""

  def init(params: Any) -> SgdState:
    del params
    return SgdState(count=jnp.zeros([], jnp.int32))

  def update(grads: Any, state: SgdState, params: Any = None) -> tuple[Any, SgdState]:
    del params
    rate = rate_at(learning_rate, state.count)
    return jax.tree.map(lambda g: -rate * g, grads), SgdState(optax.safe_increment(state.count))

  return WithRule(init, update, Rule('gradientdescent', lambda state: (rate_at(learning_rate, state.count),)))
