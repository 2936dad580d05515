"""The moments of Adam and the updates they give, in XLA and in C++ (elements.cc): the same numbers up to rounding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

# Either form: (gradients, m, v, alpha, b1, b2, eps) -> (updates, m, v), trees of one shape:
# m += (1-b1)(g-m); v += (1-b2)(g^2-v); update = -alpha m / (sqrt(v) + eps).
Moments = Callable[[Any, Any, Any, Float[Array, ''], float, float, float], tuple[Any, Any, Any]]


def xla_moments(
  grads: Any, m: Any, v: Any, alpha: Float[Array, ''], b1: float, b2: float, eps: float
) -> tuple[Any, Any, Any]:
  """See `Moments`."""
  m = jax.tree.map(lambda g, m: m + (1 - b1) * (g - m), grads, m)
  v = jax.tree.map(lambda g, v: v + (1 - b2) * (g * g - v), grads, v)
  return jax.tree.map(lambda m, v: -alpha.astype(m.dtype) * m / (jnp.sqrt(v) + eps), m, v), m, v


def native_moments(
  grads: Any, m: Any, v: Any, alpha: Float[Array, ''], b1: float, b2: float, eps: float
) -> tuple[Any, Any, Any]:
  """See `Moments`: one pass over the memory, on all threads. Leaves are float32. Needs `native.build.load()`."""
  leaves, tree = jax.tree.flatten(grads)
  count = len(leaves)
  shapes = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in leaves] * 3
  in_place = {1 + place: place for place in range(count, 3 * count)}
  call = jax.ffi.ffi_call('dlrm_adam', shapes, input_output_aliases=in_place)
  constants = {name: np.float32(value) for name, value in (('rate1', 1 - b1), ('rate2', 1 - b2), ('eps', eps))}
  out = call(alpha, *leaves, *jax.tree.leaves(m), *jax.tree.leaves(v), **constants)
  return tuple(jax.tree.unflatten(tree, out[i * count : (i + 1) * count]) for i in range(3))
