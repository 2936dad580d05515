"""Adagrad as TensorFlow has it: an initial accumulator instead of an epsilon."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.optim.rules import Rule, WithRule
from dlrm_jax.optim.schedules import LearningRate, rate_at


class AdagradState(NamedTuple):
  """What Adagrad remembers; the shapes of `a` are those of the parameters."""

  count: jax.Array  # i32[], updates done
  a: Any  # f32[...], initial accumulator plus the sum of the squared gradients


def adagrad(learning_rate: LearningRate, initial_accumulator: float = 0.1) -> optax.GradientTransformation:
  """Adagrad: a += g^2; w -= lr g / sqrt(a).

  Args:
    learning_rate: a number, or a schedule of the count of updates done.
    initial_accumulator: the first value of `a`; above 0, since nothing else keeps the root from being 0.

  Source: Duchi et al., Adaptive Subgradient Methods (JMLR 2011), in the form of TensorFlow's AdagradOptimizer.
  """
  if initial_accumulator <= 0:
    raise ValueError(f'adagrad: initial_accumulator={initial_accumulator} must be above 0; try 0.1')

  def init(params: Any) -> AdagradState:
    a = jax.tree.map(lambda w: jnp.full_like(w, initial_accumulator), params)
    return AdagradState(count=jnp.zeros([], jnp.int32), a=a)

  def update(grads: Any, state: AdagradState, params: Any = None) -> tuple[Any, AdagradState]:
    del params
    rate = rate_at(learning_rate, state.count)
    a = jax.tree.map(lambda g, a: a + g * g, grads, state.a)
    updates = jax.tree.map(lambda g, a: -rate * g / jnp.sqrt(a), grads, a)
    return updates, AdagradState(optax.safe_increment(state.count), a)

  return WithRule(init, update, Rule('adagrad', lambda state: (rate_at(learning_rate, state.count),)))
