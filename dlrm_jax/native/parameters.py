"""A step of an optimizer on all of the network's parameters at once, in C++ (parameter_updates.cc)."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from dlrm_jax.native.rows import in_place, words


def native_update(rule: str, numbers: Sequence[float | Array], gradient: Any, params: Any, slots: Sequence[Any]) -> Any:
  """The parameters and slots after one update. Needs `build.load()`. They must be donated, or they are copied.

  Args:
    rule: its name, see `optim.rules.Rule`.
    numbers: what it counts with, f32[] or i32[] each.
    gradient: by each of the parameters.
    params: a tree of float32.
    slots: trees like it.
  """
  before = [words(numbers), *jax.tree.leaves(gradient)]
  return in_place(f'dlrm_parameters_{rule}', before, (params, slots))
