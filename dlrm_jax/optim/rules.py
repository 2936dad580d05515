"""What the C++ kernels need to know of an optimizer that they have, too (native/row_updates.cc)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jax import Array


class Rule(NamedTuple):
  """An optimizer's rule for a number and those of its slots, which are `[rows, ...]` leaves of its state, in order."""

  name: str  # of the kernel: dlrm_rows_<name>
  # The state before an update -> what the rule counts with, f32[] or i32[] each, in the order that C++ has them in.
  numbers: Callable[[Any], tuple[float | Array, ...]]


class WithRule(optax.GradientTransformation):
  """An element-wise transformation, and the `rule` by which the kernels do the same."""

  rule: Rule

  def __new__(cls, init: Callable[..., Any], update: Callable[..., Any], rule: Rule) -> 'WithRule':
    transformation = super().__new__(cls, init, update)
    transformation.rule = rule
    return transformation
