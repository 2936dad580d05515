"""AdagradDecay: Adagrad whose accumulator is discounted once a period, so that long runs keep learning."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.optim.rules import Rule, WithRule
from dlrm_jax.optim.schedules import LearningRate, rate_at


class AdagradDecayState(NamedTuple):
  """What AdagradDecay remembers; the shapes of `a` are those of the parameters."""

  count: jax.Array  # i32[], updates done: the global step
  a: Any  # f32[...], discounted sum of the squared gradients
  q: Any  # i32[n, 1, ...], periods already discounted: one per row of a table [n, D]


def adagrad_decay(
  learning_rate: LearningRate,
  initial_accumulator: float = 0.1,
  decay_steps: int = 100_000,
  decay_rate: float = 0.9,
) -> optax.GradientTransformation:
  """AdagradDecay: if s // decay_steps > q: a = max(decay_rate a, initial), q += 1; then Adagrad. s = 1, 2, ...

  A row that was away for k periods is discounted once at each of its next touches until q has caught up, not k times
  at once. All rows of a dense parameter move together, so their counters are equal: one counter per parameter.

  Args:
    learning_rate: a number, or a schedule of the count of updates done.
    initial_accumulator: the first value of `a`, and the least one that discounting leaves.
    decay_steps: training steps of a period.
    decay_rate: what a period multiplies `a` with, between 0 and 1.

  Source: DeepRec, tensorflow/python/training/adagrad_decay.py at commit 20a3e06f.
  """
  if initial_accumulator <= 0:
    raise ValueError(f'adagraddecay: initial_accumulator={initial_accumulator} must be above 0; try 0.1')
  if decay_steps < 1 or decay_steps != int(decay_steps):
    raise ValueError(f'adagraddecay: decay_steps={decay_steps} must be a whole number of steps, 1 or more; try 100000')
  if not 0 < decay_rate < 1:
    raise ValueError(f'adagraddecay: decay_rate={decay_rate} must be between 0 and 1; try 0.9')

  def init(params: Any) -> AdagradDecayState:
    a = jax.tree.map(lambda w: jnp.full_like(w, initial_accumulator), params)
    q = jax.tree.map(lambda w: jnp.zeros(w.shape[:1] + (1,) * (w.ndim - 1), jnp.int32), params)
    return AdagradDecayState(count=jnp.zeros([], jnp.int32), a=a, q=q)

  def periods(state: AdagradDecayState) -> jax.Array:
    return optax.safe_increment(state.count) // int(decay_steps)

  def numbers(state: AdagradDecayState) -> tuple[float | jax.Array, ...]:
    return rate_at(learning_rate, state.count), initial_accumulator, decay_rate, periods(state)

  def update(grads: Any, state: AdagradDecayState, params: Any = None) -> tuple[Any, AdagradDecayState]:
    del params
    rate = rate_at(learning_rate, state.count)
    passed = periods(state)
    due = jax.tree.map(lambda q: passed > q, state.q)
    discounted = jax.tree.map(
      lambda a, due: jnp.where(due, jnp.maximum(decay_rate * a, initial_accumulator), a), state.a, due
    )
    a = jax.tree.map(lambda g, a: a + g * g, grads, discounted)
    q = jax.tree.map(lambda q, due: q + due.astype(q.dtype), state.q, due)
    updates = jax.tree.map(lambda g, a: -rate * g / jnp.sqrt(a), grads, a)
    return updates, AdagradDecayState(optax.safe_increment(state.count), a, q)

  return WithRule(init, update, Rule('adagraddecay', numbers))
