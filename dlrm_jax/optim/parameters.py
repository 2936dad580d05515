"""A training step of the network's parameters: their gradient -> new parameters and optimizer state."""

from typing import Any

import jax
import optax

from dlrm_jax.native.parameters import native_update
from dlrm_jax.optim.rules import WithRule


def update_parameters(
  tx: optax.GradientTransformation, gradient: Any, state: Any, params: Any, native: bool = False
) -> tuple[Any, Any]:
  """The parameters, a tree, and the state after one step of `tx`; in one pass if C++ has its rule and may be used.

  Donate state and parameters, or they are copied.
  """
  if not (native and isinstance(tx, WithRule)):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state
  is_slot = [jax.tree.structure(field) == jax.tree.structure(params) for field in state]
  slots = [field for field, is_one in zip(state, is_slot, strict=True) if is_one]
  none = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(-1)[:0], tree)
  # Of no numbers at all, all that comes back is how what is no slot advances.
  without = type(state)(*(none(field) if is_one else field for field, is_one in zip(state, is_slot, strict=True)))
  _, advanced = tx.update(none(gradient), without, none(params))
  params, slots = native_update(tx.rule.name, tx.rule.numbers(state), gradient, params, slots)
  new = iter(slots)
  return params, type(state)(*(next(new) if is_one else field for field, is_one in zip(advanced, is_slot, strict=True)))
