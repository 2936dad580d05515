"""Learning rates: a linear warm-up, a plateau, then a decay; as a function of the count of updates done."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]  # i32[], updates done -> f32[]
LearningRate = int | float | Schedule


def rate_at(learning_rate: LearningRate, count: jax.Array) -> float | jax.Array:
  """The learning rate of the update that follows `count` others (i32[])."""
  return learning_rate(count) if callable(learning_rate) else learning_rate


# Each: (rate, steps, end_factor, power) -> the schedule that goes from rate to rate * end_factor in steps, and stays.
DECAYS = {
  'constant': lambda rate, steps, end, power: optax.constant_schedule(rate),
  'linear': lambda rate, steps, end, power: optax.linear_schedule(rate, rate * end, steps),
  'cosine': lambda rate, steps, end, power: optax.cosine_decay_schedule(rate, steps, alpha=end),
  'exponential': lambda rate, steps, end, power: optax.exponential_decay(rate, steps, end, end_value=rate * end),
  'polynomial': lambda rate, steps, end, power: optax.polynomial_schedule(rate, rate * end, power, steps),
}


def schedule(
  name: str,
  learning_rate: float,
  warmup_steps: int = 0,
  decay_steps: int = 0,
  decay_start: int | None = None,
  end_factor: float = 0.0,
  power: float = 2.0,
) -> LearningRate:
  """A learning rate from plain arguments; a number if it never changes.

  'polynomial' with a warm-up, a plateau and power 2 is the policy of the public DLRM (facebookresearch/dlrm,
  dlrm_s_pytorch.py, LRPolicyScheduler).

  Args:
    name: constant, linear, cosine, exponential or polynomial.
    learning_rate: the rate between warm-up and decay.
    warmup_steps: updates over which the rate grows linearly to `learning_rate`; the first has 1/warmup_steps of it.
    decay_steps: updates that the decay takes; not read by 'constant'.
    decay_start: the update at which the decay starts, counted from the start of training; None: after the warm-up.
    end_factor: the last rate is `learning_rate * end_factor`; above 0 for 'exponential'.
    power: exponent of 'polynomial'.
  """
  start = warmup_steps if decay_start is None else decay_start
  _check(name, warmup_steps, decay_steps, start, end_factor)
  if name == 'constant' and not warmup_steps:
    return learning_rate
  pieces, boundaries = [DECAYS[name](learning_rate, decay_steps, end_factor, power)], []
  if start > warmup_steps:
    pieces, boundaries = [optax.constant_schedule(learning_rate), *pieces], [start, *boundaries]
  if warmup_steps:
    # From count + 1: with a rate of 0 the first batch would be wasted.
    ramp = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    pieces, boundaries = [lambda count: ramp(count + 1), *pieces], [warmup_steps, *boundaries]
  joined = optax.join_schedules(pieces, boundaries)
  # float32 whatever jax_enable_x64 says, so that the slots of a float32 table stay float32.
  return lambda count: jnp.asarray(joined(count), jnp.float32)


def _check(name: str, warmup_steps: int, decay_steps: int, start: int, end_factor: float) -> None:
  """Raises ValueError, with the fix, for arguments that no schedule has."""
  if name not in DECAYS:
    raise ValueError(f'learning-rate schedule {name!r} is not known; choose one of {sorted(DECAYS)}')
  if warmup_steps < 0:
    raise ValueError(f'warmup_steps={warmup_steps} must be 0 (no warm-up) or more')
  if name == 'constant':
    return
  if decay_steps < 1:
    raise ValueError(f'decay_steps={decay_steps} of schedule {name!r} must be 1 or more; try the steps of the run')
  if start < warmup_steps:
    raise ValueError(f'decay_start={start} lies in the warm-up; it must be at least warmup_steps={warmup_steps}')
  if not 0 <= end_factor <= 1 or (name == 'exponential' and end_factor == 0):
    raise ValueError(f'end_factor={end_factor} of schedule {name!r} must be between 0 and 1 (exponential: above 0)')
