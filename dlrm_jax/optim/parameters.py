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
  is_slot = lambda field: jax.tree.structure(field) == jax.tree.structure(params)
  slots = {name: field for name, field in state._asdict().items() if is_slot(field)}
  none = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(-1)[:0], tree)
  # Of no numbers at all, all that comes back is how what is no slot advances.
  _, advanced = tx.update(none(gradient), state._replace(**none(slots)), none(params))
  params, new = native_update(tx.rule.name, tx.rule.numbers(state), gradient, params, list(slots.values()))
  return params, advanced._replace(**dict(zip(slots, new, strict=True)))
