"""Numbers in half the memory: bfloat16 ones, kept in tables and sent to other devices as their bits in uint16.

As bits, since XLA:CPU turns a whole bfloat16 table into float32 and back to write a few of its rows, and sends bfloat16
numbers as float32. Rows are widened to float32 when they are read, and rounded when they are written: up or down at
random, in proportion to how near either neighbour is, so that updates far smaller than the spacing of bfloat16 are kept
on average.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt16, UInt32

from dlrm_jax.words import mix

QUIET_NAN = 0x7FC0


def widen(tree: Any) -> Any:
  """The tree with uint16 leaves as the float32 numbers that they stand for, and all other leaves as they are."""
  return jax.tree.map(lambda leaf: _widen(leaf) if leaf.dtype == jnp.uint16 else leaf, tree)


def _widen(bits: UInt16[Array, '...']) -> Float[Array, '...']:
  return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def to_nearest(value: Float[Array, '...']) -> UInt16[Array, '...']:
  """The bits of the nearest bfloat16."""
  return jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)


def stored(value: Array, dtype: str) -> Array:
  """Numbers in a type: float32, as they are, or bfloat16, bits of the nearest ones. `widen` is the way back."""
  return to_nearest(value) if dtype == 'bfloat16' else value


def narrow(tree: Any, like: Any, row: Int32[Array, 'K'], step: Int32[Array, '']) -> Any:
  """The tree with float32 leaves [K, ...] rounded at random to uint16 where `like` has uint16 leaves.

  What is drawn depends on the row, the place in it, the step and the leaf; not on the lane, so not on the order of a
  batch.
  """
  leaves, structure = jax.tree.flatten(tree)
  wanted = structure.flatten_up_to(like)
  out = [
    _at_random(leaf, noise(row, leaf.shape[1:], step, salt)) if old.dtype == jnp.uint16 else leaf
    for salt, (leaf, old) in enumerate(zip(leaves, wanted, strict=True))
  ]
  return structure.unflatten(out)


def _at_random(value: Float[Array, 'K ...'], draw: UInt32[Array, 'K ...']) -> UInt16[Array, 'K ...']:
  # The bits of a float count its magnitude in steps: adding less than a whole step of bfloat16, then cutting, rounds up
  # as often as the part that is cut off is large.
  bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
  rounded = ((bits + (draw & 0xFFFF)) >> 16).astype(jnp.uint16)
  return jnp.where(jnp.isnan(value), jnp.uint16(QUIET_NAN), rounded)


def noise(row: Int32[Array, 'K'], shape: tuple[int, ...], step: Int32[Array, ''], salt: int) -> UInt32[Array, 'K ...']:
  """Random bits [K, *shape]: a hash, since a counter-based generator of JAX's costs more than the whole update."""
  place = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
  seed = mix(step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(salt))
  lanes = mix(row.astype(jnp.uint32) + seed).reshape(-1, *(1 for _ in shape))
  return mix(lanes + place[None] * jnp.uint32(0x85EBCA6B))
