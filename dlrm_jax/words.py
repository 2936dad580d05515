"""Arithmetic of 32-bit words, which JAX has by default where it has no longer ones."""

import jax.numpy as jnp
from jaxtyping import Array, UInt32


def mix(x: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """The finalizer of MurmurHash3, a bijection of 32-bit words in which every bit reaches every bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def scale(word: UInt32[Array, '...'], size: int) -> UInt32[Array, '...']:
  """word * size / 2**32, which is below `size`: in halves, for want of 64 bits."""
  low, high, small, large = word & 0xFFFF, word >> 16, size & 0xFFFF, size >> 16
  middle = high * jnp.uint32(small) + (low * jnp.uint32(small) >> 16)
  carry = low * jnp.uint32(large) + (middle & 0xFFFF)
  return high * jnp.uint32(large) + (middle >> 16) + (carry >> 16)
