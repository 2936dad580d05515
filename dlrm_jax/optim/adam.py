"""Adam with TensorFlow's epsilon, which is added to the root of the uncorrected second moment."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.optim.rules import Rule, WithRule
from dlrm_jax.optim.schedules import LearningRate, rate_at


class AdamState(NamedTuple):
  """What Adam remembers; the shapes of `m` and `v` are those of the parameters."""

  count: jax.Array  # i32[], updates done; b1^count and b2^count are TensorFlow's beta powers, one update behind
  m: Any  # f32[...], running mean of the gradients
  v: Any  # f32[...], running mean of their squares


def adam(
  learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam: m += (1-b1)(g-m); v += (1-b2)(g^2-v); w -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v)+eps).

  `optax.adam` adds eps to the root of the *corrected* v, which early in training is a much smaller eps.

  Args:
    learning_rate: a number, or a schedule of the count of updates done.
    b1: decay of the running mean, in [0, 1).
    b2: decay of the running mean of squares, in [0, 1).
    eps: the "epsilon hat" of the paper's section 2.

  Source: Kingma and Ba, arXiv:1412.6980, in the form of TensorFlow's AdamOptimizer.
  """
  check_betas('adam', b1, b2)

  def init(params: Any) -> AdamState:
    # Two trees of zeros: under donation m and v must not be one buffer.
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return AdamState(count=jnp.zeros([], jnp.int32), m=m, v=v)

  def rate(state: AdamState) -> jax.Array:
    return rate_at(learning_rate, state.count) * bias_correction(optax.safe_increment(state.count), b1, b2)

  def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
    del params
    alpha = rate(state)
    m = jax.tree.map(lambda g, m: m + (1 - b1) * (g - m), grads, state.m)
    v = jax.tree.map(lambda g, v: v + (1 - b2) * (g * g - v), grads, state.v)
    updates = jax.tree.map(lambda m, v: -alpha.astype(m.dtype) * m / (jnp.sqrt(v) + eps), m, v)
    return updates, AdamState(optax.safe_increment(state.count), m, v)

  return WithRule(init, update, Rule('adam', lambda state: (rate(state), 1 - b1, 1 - b2, eps)))


def check_betas(name: str, b1: float, b2: float) -> None:
  """Raises ValueError unless both decays are in [0, 1): at 1 the moments never leave 0 and 0/0 follows."""
  for key, value in (('b1', b1), ('b2', b2)):
    if not 0 <= value < 1:
      raise ValueError(f'{name}: {key}={value} must be at least 0 and below 1; try b1=0.9, b2=0.999')


def bias_correction(count: jax.Array, b1: float, b2: float) -> jax.Array:
  """sqrt(1 - b2^count) / (1 - b1^count), f32[]; `count` is i32[], 1 or more.

  1 - b^t is taken as -expm1(t log b): in float32 a running product drifts, 1 - 0.999 alone has an error of 1e-5, and
  this has neither, at any count.
  """
  t = count.astype(float)
  one_minus_p1, one_minus_p2 = (-jnp.expm1(t * (math.log(b) if b else -math.inf)) for b in (b1, b2))
  return jnp.sqrt(one_minus_p2) / one_minus_p1
