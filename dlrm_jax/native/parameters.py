"""A step of an optimizer on all of the network's parameters at once, in C++ (parameter_updates.cc)."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from dlrm_jax.native.rows import words


def native_update(rule: str, numbers: Sequence[float | Array], gradient: Any, params: Any, slots: Sequence[Any]) -> Any:
  """The parameters and slots after one update. Needs `build.load()`. They must be donated, or they are copied.

  Args:
    rule: its name, see `optim.rules.Rule`.
    numbers: what it counts with, f32[] or i32[] each.
    gradient: by each of the parameters.
    params: a tree of float32.
    slots: trees like it.
  """
  leaves, tree = jax.tree.flatten((params, *slots))
  before = [words(numbers), *jax.tree.leaves(gradient)]
  same = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
  aliases = {len(before) + place: place for place in range(len(leaves))}
  params, *slots = tree.unflatten(
    jax.ffi.ffi_call(f'dlrm_parameters_{rule}', same, input_output_aliases=aliases)(*before, *leaves)
  )
  return params, slots
